"""Tiny models for tests and trials: trained ones, outliers injected without changing the function, random ones of every architecture.

A random model cannot show a collapse: quantization changes its noise into other noise. A byte-level model trained for half
a minute can, once some of its channels are as outlying as those of a large model.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from ptq.config import TextConfig
from ptq.data.sources import read_text
from ptq.links import trace_links
from ptq.network import build_network, weight_of
from ptq.stream import BlockStream
from ptq.weights import ResidentWeights

BYTE_VOCABULARY = 258
"""256 bytes, begin and end of text."""
BOS, EOS = 256, 257
KINDS = ("opt", "llama")
ARCHITECTURES = (
    "opt", "llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "phi", "bloom", "falcon", "gpt2", "mixtral",
)  # fmt: skip

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 6}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 6,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "phi": ("phi", _LLAMA_LIKE),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4}),
}  # fmt: skip


def random_tiny(architecture: str, seed: int = 0) -> Any:
    """Returns a tiny random causal language model in fp32 with non-trivial norm gains and biases; vocabulary 64.

    Args:
        architecture: one of `ARCHITECTURES`.
        seed: of the weights.
    """
    model_type, options = _RANDOM[architecture]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, **options, **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    model.config.use_cache = False
    return model


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are the 256 byte values, plus ``<s>`` (256) and ``</s>`` (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(kind: str) -> Any:
    """Returns the config of the tiny trained model of `kind` (opt: ReLU, LayerNorm; llama: grouped queries, SwiGLU)."""
    common: dict[str, Any] = {
        "vocab_size": BYTE_VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 256, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None,
    }  # fmt: skip
    if kind == "opt":
        return transformers.OPTConfig(**common, ffn_dim=384, word_embed_proj_dim=128, dropout=0.0)
    return transformers.LlamaConfig(**common, intermediate_size=320, num_key_value_heads=2, tie_word_embeddings=True)


def train_tiny(kind: str, folder: pathlib.Path, steps: int = 350, seed: int = 0) -> pathlib.Path:
    """Trains a byte-level model on CPython's documentation and saves it with its tokenizer, as transformers does.

    Args:
        kind: ``opt`` or ``llama``.
        folder: where to; created.
        steps: optimizer steps of 16 x 128 bytes.
        seed: of the weights and the batches.

    Raises:
        ValueError: for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    tokenizer = byte_tokenizer()
    text = torch.tensor(tokenizer(read_text(TextConfig(), "docs").joined, add_special_tokens=False).input_ids)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).train()
        _train(model, text, steps)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train(model: Any, text: torch.Tensor, steps: int, batch: int = 16, length: int = 128) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch,))
        ids = torch.stack([text[s : s + length] for s in starts.tolist()])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def tiny_model(
    kind: str, cache: pathlib.Path, steps: int = 350, seed: int = 0, outliers: float | None = None
) -> pathlib.Path:
    """Returns the folder of a tiny trained model, trained on first use and kept under `cache`.

    Args:
        kind: ``opt`` or ``llama``.
        cache: folder for trained models; entries are keyed by options, torch and transformers.
        steps: optimizer steps.
        seed: of weights, batches and outlier channels.
        outliers: greatest factor for `inject_outliers`, or None for the model as trained.
    """
    text = hashlib.sha256(read_text(TextConfig(), "docs").joined.encode()).hexdigest()
    key = [text, kind, steps, seed, outliers, torch.__version__, transformers.__version__, tiny_config(kind).to_dict()]
    folder = cache / f"{kind}-{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix=".tiny-"))
    try:
        if outliers is None:
            train_tiny(kind, temporary, steps, seed)
        else:
            source = tiny_model(kind, cache, steps, seed)
            model = transformers.AutoModelForCausalLM.from_pretrained(source)
            inject_outliers(model, outliers, seed=seed)
            model.save_pretrained(temporary)
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(temporary)
        if not folder.is_dir():
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@torch.no_grad()
def inject_outliers(model: Any, factor: float = 60.0, channels: int = 4, seed: int = 0) -> list[int]:
    """Makes some channels of every norm's output outlying without changing the model's function. Returns the channels.

    At every link from a norm its gain and bias at a channel are multiplied by c and the readers' columns divided by c, c
    between `factor` / 2 and `factor`. The channels are those with the greatest gain in the first block, the same in every
    block, as in OPT. The logits change by rounding only.

    Args:
        model: a causal language model whose norm links are found by tracing; norms that multiply by their ``weight``.
        factor: greatest c.
        channels: how many channels.
        seed: of the factors.
    """
    network = build_network(model)
    traces = trace_links(network, BlockStream(network, ResidentWeights(), next(model.parameters()).device))
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] | None = None
    for trace in traces.values():
        for link in trace.links:
            if link.kind != "norm":
                continue
            norm = model.get_submodule(link.producer)
            if chosen is None:
                chosen = norm.weight.abs().topk(channels).indices.tolist()
            scale = factor * 2 ** -torch.rand(channels, generator=generator)
            _scale_channels(norm, [model.get_submodule(r) for r in link.readers], chosen, scale)
    return chosen or []


def _scale_channels(norm: Any, readers: Iterable[nn.Module], channels: list[int], scale: torch.Tensor) -> None:
    scale = scale.to(norm.weight)
    norm.weight[channels] *= scale
    if getattr(norm, "bias", None) is not None:
        norm.bias[channels] *= scale
    for reader in readers:
        weight_of(reader)[:, channels] /= scale
