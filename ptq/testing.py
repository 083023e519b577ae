"""Tiny models for tests and trials: trained ones, outliers injected without changing the function, random ones of every architecture.

A random model cannot show a collapse: quantization changes its noise into other noise. A byte-level model trained for less
than a minute can, once some of its channels are as outlying as those of a large model: rounding to one range a tensor then
costs it several times its perplexity.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from ptq.config.schema import TextConfig
from ptq.data.sources import read_text
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.links import Link, trace_links
from ptq.network.network import Network, build_network, is_linear, weight_of

RELEASE = 2
"""Counts changes of the training and the injection, so that no cache gives a model of older ones."""
BYTE_VOCABULARY = 258
"""256 bytes, begin and end of text."""
BOS, EOS = 256, 257
ARCHITECTURES = (
    "opt", "llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "phi", "bloom", "falcon", "gpt2", "mixtral",
)  # fmt: skip
MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss", "llama4", "dbrx", "jetmoe", "phimoe",
)  # fmt: skip
"""Mixtures of experts, each of which holds its experts, its router and shared experts in a way of its own."""


@dataclass(frozen=True)
class Training:
    """How a tiny model is trained: `steps` of `batch` x `TRAINED_LENGTH` bytes with AdamW, `rate` at the peak of one cycle."""

    steps: int
    batch: int
    rate: float


TRAINED_LENGTH = 128
"""Bytes in a training window. Positions beyond have never been trained: evaluate at this length or less."""
TRAINING = {"opt": Training(steps=850, batch=8, rate=1.5e-3), "llama": Training(steps=350, batch=16, rate=4e-3),
            "mixtral": Training(steps=280, batch=16, rate=4e-3)}  # fmt: skip
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_ROUTED: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
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
    "qwen2_moe": ("qwen2_moe", {**_LLAMA_LIKE, **_ROUTED, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA_LIKE, **_ROUTED, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": ("olmoe", {**_LLAMA_LIKE, **_ROUTED}),
    "granitemoe": ("granitemoe", {**_LLAMA_LIKE, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {
        **_LLAMA_LIKE, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "moe_intermediate_size": 24,
    }),
    "gpt_oss": ("gpt_oss", {**_LLAMA_LIKE, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama4": ("llama4_text", {**_LLAMA_LIKE, "num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 8,
                               "interleave_moe_layer_step": 1}),
    "dbrx": ("dbrx", {
        "vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    }),
    "jetmoe": ("jetmoe", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2,
                          "kv_channels": 8, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {**_LLAMA_LIKE, "num_local_experts": 4}),
}  # fmt: skip


def random_tiny(architecture: str, seed: int = 0) -> Any:
    """Returns a tiny random causal language model in fp32 with non-trivial norm gains and biases; vocabulary 64.

    Args:
        architecture: one of `ARCHITECTURES` or `MIXTURES`.
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
    """Returns the config of the tiny trained model of `kind` (opt: ReLU, LayerNorm; llama: grouped queries, SwiGLU; mixtral:
    the same with eight experts, of which a token sees two).
    """
    common: dict[str, Any] = {
        "vocab_size": BYTE_VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 256, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None,
    }  # fmt: skip
    if kind == "opt":
        return transformers.OPTConfig(**common, ffn_dim=384, word_embed_proj_dim=128, dropout=0.0)
    if kind == "mixtral":
        common["num_hidden_layers"] = 3
        return transformers.MixtralConfig(
            **common, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True, num_local_experts=8,
            num_experts_per_tok=2, sliding_window=None,
        )  # fmt: skip
    return transformers.LlamaConfig(**common, intermediate_size=320, num_key_value_heads=2, tie_word_embeddings=True)


def train_tiny(kind: str, folder: pathlib.Path, steps: int | None = None, seed: int = 0) -> pathlib.Path:
    """Trains a byte-level model on CPython's documentation and saves it with its tokenizer, as transformers does.

    Args:
        kind: ``opt``, ``llama`` or ``mixtral``.
        folder: where to; created.
        steps: optimizer steps; None for those of `TRAINING`.
        seed: of the weights and the batches.

    Raises:
        ValueError: for another kind.
    """
    training = _training(kind, steps)
    tokenizer = byte_tokenizer()
    text = torch.tensor(tokenizer(read_text(TextConfig(), "docs").joined, add_special_tokens=False).input_ids)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).train()
        if kind == "opt":
            _start_positions(model.model.decoder.embed_positions.weight)
        _train(model, text, training)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _training(kind: str, steps: int | None) -> Training:
    if kind not in TRAINING:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(TRAINING)}")
    return TRAINING[kind] if steps is None else dataclasses.replace(TRAINING[kind], steps=steps)


@torch.no_grad()
def _start_positions(weight: torch.Tensor) -> None:
    """Starts learned positions (positions, channels) as sinusoids: from noise they take longer to learn than all the rest."""
    positions, channels = weight.shape
    rate = torch.exp(torch.arange(0, channels, 2) * (-math.log(1000.0) / channels))
    angle = torch.arange(positions)[:, None] * rate
    weight[:, 0::2], weight[:, 1::2] = 0.05 * angle.sin(), 0.05 * angle.cos()


def _train(model: Any, text: torch.Tensor, training: Training) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, total_steps=training.steps, pct_start=0.1)
    for _ in range(training.steps):
        starts = torch.randint(len(text) - TRAINED_LENGTH, (training.batch,))
        ids = torch.stack([text[s : s + TRAINED_LENGTH] for s in starts.tolist()])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def tiny_model(
    kind: str, cache: pathlib.Path, steps: int | None = None, seed: int = 0, outliers: float | None = None
) -> pathlib.Path:
    """Returns the folder of a tiny trained model, trained on first use and kept under `cache`.

    Args:
        kind: ``opt``, ``llama`` or ``mixtral``.
        cache: folder for trained models; entries are keyed by options, torch and transformers.
        steps: optimizer steps; None for those of `TRAINING`.
        seed: of weights, batches and outlier channels.
        outliers: greatest factor for `inject_outliers`, or None for the model as trained.

    Raises:
        ValueError: for another kind.
    """
    training = dataclasses.asdict(_training(kind, steps))
    text = hashlib.sha256(read_text(TextConfig(), "docs").joined.encode()).hexdigest()
    key = [
        RELEASE, text, kind, training, seed, outliers,
        torch.__version__, transformers.__version__, tiny_config(kind).to_dict(),
    ]  # fmt: skip
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
def inject_outliers(model: Any, factor: float = 60.0, channels: int = 16, seed: int = 0) -> list[int]:
    """Makes some channels of every link outlying without changing the model's function. Returns those of the norms.

    At every link the writer's output at a channel (a norm's gain and bias, a Linear's row and bias) is multiplied by c and
    the readers' columns are divided by c, c between 0.9 and 1 times `factor`. The norms' channels are the same in every
    block, as in OPT; other links have their own. All are those with the greatest weights, so that the others are small
    beside them. Per tensor both sides suffer: inputs lose the other channels, weights lose the columns of these.
    The logits change by rounding only.

    Args:
        model: a causal language model whose links are found by tracing; its norms multiply by their ``weight``. Between
            fc1 and fc2 outliers are put where the activation function is a ReLU, which lets positive factors through.
        factor: greatest c.
        channels: how many channels of a link.
        seed: of the factors.
    """
    network = build_network(model)
    traces = trace_links(network, BlockStream(network, ResidentWeights(), next(model.parameters()).device))
    pairs = [(link, _writer(network, link)) for trace in traces.values() for link in trace.links]
    norms = [_size(writer) for link, writer in pairs if link.kind == "norm" and writer is not None]
    shared = torch.stack(norms).sum(0).topk(channels).indices if norms else torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for link, writer in pairs:
        if writer is None:
            continue
        size = _size(writer)
        chosen = shared if link.kind == "norm" else size.topk(channels).indices
        scale = torch.ones_like(size)
        scale[chosen] = (factor * (1 - 0.1 * torch.rand(channels, generator=generator))).to(scale)
        if is_linear(writer):
            weight_of(writer).mul_(scale[:, None])
        else:
            writer.weight.mul_(scale)
        if getattr(writer, "bias", None) is not None:
            writer.bias.mul_(scale)
        for reader in link.readers:
            weight_of(model.get_submodule(reader)).div_(link.reader_scale(scale))
    return shared.tolist()


def _writer(network: Network, link: Link) -> Any:
    """Returns the module whose weights scale the link's tensor: the norm, the Linear, or the Linear before a ReLU; else None."""
    producer: Any = network.model.get_submodule(link.producer)
    if link.kind != "activation":
        return producer
    width = weight_of(network.model.get_submodule(link.readers[0])).shape[1]
    before = [m for m in network.blocks[link.block].linears.values() if weight_of(m).shape[0] == width]
    return before[0] if isinstance(producer, nn.ReLU) and len(before) == 1 else None


def _size(writer: Any) -> torch.Tensor:
    """Returns how large each channel of what `writer` writes gets, roughly: four standard deviations beside its bias."""
    bias = getattr(writer, "bias", None)
    spread = 4 * (weight_of(writer).norm(dim=1) if is_linear(writer) else writer.weight.abs())
    return spread if bias is None else spread + bias.abs()
