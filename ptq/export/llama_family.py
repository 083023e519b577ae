"""What llama2.c and KuiperLLama share: LLaMA blocks in Q8_0, refused by field name where a model or a scheme is another."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.export.base import advice, refuse_attention, refuse_outside, require, specs_by_linear
from ptq.export.quantized_tensors import LinearTensors, QuantizedTensors, rounded
from ptq.network.network import Network
from quantize.codecs.q8_0 import encode_flat
from quantize.spec.quant_spec import QuantSpec

PROJECTIONS = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
}  # fmt: skip
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
MODEL_TYPES = ("llama", "mistral")
PIECE = 1 << 20
"""Values of a table that are encoded at once."""
SHIPPED_SIZE = 64
"""Values in a group of the schemes w8a8_g64 and w8a16_g64."""


@dataclass(frozen=True)
class Runtime:
    """What a reader hard-codes, which no field of its file can change.

    Attributes:
        name: of the format, for messages.
        rope_base: base of the rotary embedding.
        eps: of the RMS norms.
        interleaved: rotary pairs are neighbours (2i, 2i + 1); otherwise (i, i + head_dim / 2) as in transformers.
        int8_inputs: every Linear's input is rounded to int8 in groups; otherwise it stays in fp32.
        int8_embedding: the embedding is in int8 groups; otherwise it is in fp32.
    """

    name: str
    rope_base: float
    eps: float
    interleaved: bool
    int8_inputs: bool
    int8_embedding: bool


@dataclass(frozen=True)
class Shape:
    """The sizes that the headers hold."""

    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    shared: bool
    group_size: int


def shape_of(scheme: SchemeConfig, network: Network) -> Shape:
    """Returns the sizes of a model that `check_model` and `check_scheme` have passed."""
    config = network.model.config
    spec = next(iter(specs_by_linear(scheme, network).values())).weight
    return Shape(
        config.hidden_size, config.intermediate_size, len(network.blocks), config.num_attention_heads,
        config.num_key_value_heads, network.model.get_input_embeddings().num_embeddings,
        config.max_position_embeddings, bool(config.tie_word_embeddings), int(getattr(spec, "group_size", 0) or 0),
    )  # fmt: skip


def check_model(network: Network, runtime: Runtime) -> None:
    """Raises `UserError` naming the config's field for a model that the runtime would compute wrongly."""
    config = network.model.config
    if config.model_type not in MODEL_TYPES:
        raise _field(runtime, "model_type", config.model_type, " or ".join(MODEL_TYPES))
    names = {f"{block.name}.{p}" for block in network.blocks for p in PROJECTIONS.values()}
    if names != set(network.linears):
        other = sorted(names ^ set(network.linears))[0]
        raise UserError(
            f"export: {runtime.name} has a place for LLaMA's seven Linears a block only, and {other} is not one"
        )
    rope = config.rope_parameters or {}
    expected: list[tuple[str, Any, Any]] = [
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
        ("rope_parameters.rope_theta", rope.get("rope_theta"), runtime.rope_base),
        ("rms_norm_eps", config.rms_norm_eps, runtime.eps),
        ("head_dim", getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
         config.hidden_size // config.num_attention_heads),
        ("hidden_size % num_attention_heads", config.hidden_size % config.num_attention_heads, 0),
        ("num_attention_heads % num_key_value_heads", config.num_attention_heads % config.num_key_value_heads, 0),
    ]  # fmt: skip
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        expected.append(("sliding_window", window, None))
    biased = next((n for n, m in network.linears.items() if getattr(m, "bias", None) is not None), None)
    if biased is not None:
        raise _field(runtime, "mlp_bias" if ".mlp." in biased else "attention_bias", True, "false")
    for field, value, wanted in expected:
        same = math.isclose(value, wanted, rel_tol=1e-4) if isinstance(wanted, float) else value == wanted
        if not same:
            raise _field(runtime, field, value, wanted)


def _field(runtime: Runtime, field: str, value: Any, wanted: Any) -> UserError:
    return UserError(
        f"export: {runtime.name} reads no {field}: the model's is {value!r}, its runtime computes with {wanted}: "
        "choose a model that has it, or another format"
    )


def nearest_group_size(network: Network) -> int:
    """Returns 64, halved until it divides both the hidden and the intermediate size (the original checks only the first)."""
    size = SHIPPED_SIZE
    config = network.model.config
    while config.hidden_size % size or config.intermediate_size % size:
        size //= 2
    return size


def check_scheme(scheme: SchemeConfig, network: Network, runtime: Runtime) -> None:
    """Raises `UserError` unless every Linear has int8 weights in symmetric groups of one size, embedding and head the same or no format,
    and the inputs fit the runtime.
    """
    config, size = network.model.config, nearest_group_size(network)
    specs = specs_by_linear(scheme, network)
    sizes = {s.weight.group_size for s in specs.values() if s.weight is not None and s.weight.group_size is not None}
    if len(sizes) == 1 and not any(d % next(iter(sizes)) for d in (config.hidden_size, config.intermediate_size)):
        size = next(iter(sizes))
    tensors = ("weight", "input") if runtime.int8_inputs else ("weight",)
    sized = "" if size == SHIPPED_SIZE else "".join(f" scheme.{tensor}.group_size={size}" for tensor in tensors)
    groups = f"bits: 8, granularity: group, group_size: {size}"
    inputs = f"{groups}, dynamic: true" if runtime.int8_inputs else None
    nearest = advice(f"scheme={'w8a8_g64' if runtime.int8_inputs else 'w8a16_g64'}{sized}", groups, inputs)
    refuse_attention(scheme, runtime.name, nearest)
    # A tied embedding in fp32 can hold the head's rounded values.
    if not runtime.int8_embedding and not config.tie_word_embeddings:
        refuse_outside(scheme, runtime.name, ("embedding",))
    nearest += " for every Linear"
    allowed = {"format": ("int",), "bits": (8,), "granularity": ("group",), "group_size": (size,), "symmetric": (True,)}
    for tensor, weight in (("embedding", scheme.embedding), ("head", scheme.head)):
        if weight is not None:
            require(
                weight, f"scheme.{tensor}", f"the {tensor}", runtime.name, f"scheme.{tensor}={{{groups}}}", **allowed
            )
    for name, spec in specs.items():
        for tensor, found, wanted in (("weight", spec.weight, True), ("input", spec.input, runtime.int8_inputs)):
            path = f"scheme.{tensor}"
            if (found is None) == wanted:
                raise UserError(
                    f"{path}: {'null' if found is None else 'quantized'} for {name}, which {runtime.name} cannot express: use {nearest}"
                )
            if found is not None:
                dynamic = {"dynamic": (True,)} if tensor == "input" else {}
                require(found, path, name, runtime.name, nearest, **allowed, **dynamic)


def unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns the rows (heads x head_dim, n) of a q or k weight in the order of interleaved rotary pairs."""
    return rows.view(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def write_quantized(file: BinaryIO, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Writes int8 codes, then fp32 scales."""
    write_array(file, codes.to(torch.int8))
    write_array(file, scales.float())


def write_array(file: BinaryIO, values: torch.Tensor) -> None:
    """Writes a tensor's values in row-major order, little-endian, about a MiB of them at a time."""
    for piece in values.detach().reshape(-1).split(PIECE):
        array = piece.cpu().numpy()
        file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def write_linear(file: BinaryIO, tensors: LinearTensors, heads: int | None) -> None:
    """Writes a quantized Linear; with `heads`, its rows in the order of interleaved rotary pairs."""
    codes, scales = torch.as_tensor(tensors.codes), tensors.row_scales()
    if heads is not None:
        codes, scales = unpermuted(codes, heads), unpermuted(scales, heads)
    write_quantized(file, codes, scales)


def write_table(file: BinaryIO, table: LinearTensors, group_size: int) -> float | None:
    """Writes embedding or head in int8 groups. Returns the greatest error of one that the scheme leaves in floating point, which is
    quantized here piece by piece; None for one that the scheme has quantized.
    """
    if table.spec is not None:
        write_linear(file, table, None)
        return None
    scales, greatest = [], 0.0
    for piece in torch.as_tensor(table.weight).detach().reshape(-1).split(PIECE // group_size * group_size):
        codes, scale, error = encode_flat(piece, group_size)
        write_array(file, codes)
        scales.append(scale)
        greatest = max(greatest, error)
    write_array(file, torch.cat(scales))
    return greatest


def linears_in_order(
    source: QuantizedTensors, shape: Shape, interleaved: bool
) -> Iterator[tuple[LinearTensors, int | None]]:
    """Yields wq of all layers, wk, wv, wo, w1, w2, w3, each with the heads to un-permute by, or None."""
    heads = {"wq": shape.heads, "wk": shape.kv_heads} if interleaved else {}
    for short, projection in PROJECTIONS.items():
        for block in source.network.blocks:
            yield source.linear(f"{block.name}.{projection}"), heads.get(short)


def norms_in_order(source: QuantizedTensors) -> Iterator[torch.Tensor]:
    """Yields all attention norms, all feed-forward norms, the final norm, in fp32."""
    for norm in NORMS:
        for block in source.network.blocks:
            yield source.tensor(f"{block.name}.{norm}").float()
    outer = source.network.blocks[0].name.rpartition(".")[0].rpartition(".")[0]
    yield source.tensor(f"{outer}.norm.weight").float()


def embedding_of(source: QuantizedTensors) -> LinearTensors:
    """Returns the token embedding (vocabulary, dim), quantized where the scheme gives it a format."""
    return _outside(source, source.network.model.get_input_embeddings(), source.scheme.embedding)


def head_of(source: QuantizedTensors) -> LinearTensors:
    """Returns the output matrix (vocabulary, dim), quantized where the scheme gives it a format."""
    return _outside(source, source.network.model.get_output_embeddings(), source.scheme.head)


def _outside(source: QuantizedTensors, module: Any, spec: QuantSpec | None) -> LinearTensors:
    name = _name_of(source, module)
    weight = source.tensor(f"{name}.weight")
    return LinearTensors(name, None, None, None, None, weight, None) if spec is None else rounded(name, weight, spec)


def _name_of(source: QuantizedTensors, module: Any) -> str:
    return next(name for name, m in source.network.model.named_modules() if m is module)


def streamed(write: Callable[[BinaryIO], None]) -> Callable[[Any], None]:
    """Returns a writer of a path, for `write_atomic`, out of a writer of an open file."""

    def fill(path: Any) -> None:
        with open(path, "wb") as file:
            write(file)

    return fill
