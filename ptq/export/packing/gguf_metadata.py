"""The metadata of a GGUF file: the sizes that llama.cpp reads, and the tokenizer."""

import json
import pathlib
from typing import Any

import gguf

from ptq.errors import UserError
from ptq.export.vocabulary import UNUSED, Vocabulary, vocabulary_of
from ptq.models.gguf_tokenizer import pre_of

NO_SCORE = -1e6
"""Score of a SentencePiece token that nothing is merged into: below every merge."""
PRE_TOKENIZERS = (
    # What a pre-tokenizer of transformers contains, and what llama.cpp calls it; the first that fits counts.
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|", "llama-bpe"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|", "qwen2"),
    ('"individual_digits": true', "smollm"),
    ('"use_regex": true', "gpt-2"),
)


def add_sizes(writer: gguf.GGUFWriter, config: Any, name: str, embedding_rows: int) -> None:
    """Adds what llama.cpp builds the graph from. Gemma's two rotary bases: that of the full layers is stored.

    Sizes of a mixture are added where the config has them, under whichever of transformers' names.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    for field, add in (
        ("num_experts", writer.add_expert_count),
        ("num_local_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if isinstance(size := config.__dict__.get(field), int):
            add(size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(embedding_rows)
    if getattr(config, "sliding_window", None) and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        writer.add_sliding_window(int(config.sliding_window))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def copy_tokenizer(writer: gguf.GGUFWriter, origin: pathlib.Path) -> None:
    """Copies the tokenizer out of the GGUF file that the model was read from: nothing is lost on the way."""
    for key, field in gguf.GGUFReader(origin).fields.items():
        if key.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, rows: int, pre: str | None) -> None:
    """Adds a fast tokenizer of transformers.

    Args:
        writer: the file.
        tokenizer: BPE over bytes, or of SentencePiece's kind.
        rows: of the embedding; ids without a token get a name that no text has.
        pre: llama.cpp's name of the pre-tokenizer, or None to tell it by its pattern.

    Raises:
        UserError: for a pre-tokenizer that is not known here.
    """
    found = vocabulary_of(tokenizer, rows)
    tokens = [
        f"[PAD{i}]" if kind == UNUSED else t for i, (t, kind) in enumerate(zip(found.tokens, found.kinds, strict=True))
    ]
    writer.add_tokenizer_model("gpt2" if found.byte_level else "llama")
    writer.add_tokenizer_pre(pre or _pre_tokenizer(found))
    writer.add_token_list(tokens)
    if not found.byte_level:
        writer.add_token_scores([NO_SCORE if score is None else score for score in found.scores])
        writer.add_add_space_prefix(found.space_prefix)
    writer.add_token_types(found.kinds)
    if found.byte_level:
        # llama.cpp wants the list even where there are no merges; special tokens never meet as symbols.
        writer.add_token_merges([f"{a} {b}" for a, b in found.merges] or [f"{tokens[-1]} {tokens[-1]}"])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id), (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id), (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):  # fmt: skip
        if token is not None:
            add(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(found: Vocabulary) -> str:
    if not found.byte_level or not found.merges:
        return "default"
    splitting = found.state.get("pre_tokenizer")
    if (name := pre_of(splitting)) is not None:
        return name
    text = json.dumps(splitting)
    for part, name in PRE_TOKENIZERS:
        if part in text or json.dumps(part)[1:-1] in text:
            return name
    raise UserError(
        "export.options.pre: null, and this tokenizer splits text in a way that is not known here: "
        "name llama.cpp's pre-tokenizer for it, such as llama-bpe or gpt-2"
    )
