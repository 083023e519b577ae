"""GGUF for llama.cpp: LLaMA, Mistral, Qwen2, Gemma3 (text), and the mixtures Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE, with Q8_0,
Q4_0, Q4_1, K-quants and 16-bit weights, side by side.

Expresses: weights q4_k, q5_k and q6_k, with rows of whole superblocks of 256; weights int, symmetric up to 4 bits (Q4_0) or 8 (Q8_0), or with zero points up to 4 bits (Q4_1), in groups of
32 or of whole multiples of it, per channel or per tensor (a block of 32 repeats the scale that it shares); inputs and
attention unquantized, because the file does not say how a runtime rounds them. Embedding and head have
such a format too where the scheme gives them one; they and Linears left alone are stored in 16 bits where that loses nothing, norms,
biases and routers in fp32. The experts of a block are one tensor for each of their matrices, (experts, out, in), of one format.
"""

import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import torch

from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.export.base import Exported, advice, most_weight_bits, refuse_attention, require, specs_by_linear
from ptq.export.llama_family import unpermuted
from ptq.export.packing.gguf_blocks import BLOCK, blocks_of, type_of
from ptq.export.packing.gguf_metadata import add_sizes, add_tokenizer, copy_tokenizer
from ptq.export.packing.k_blocks import TYPES, superblock_columns
from ptq.export.quantized_tensors import LinearTensors, QuantizedTensors, rounded
from ptq.files.atomic import write_atomic
from ptq.network.network import Network
from ptq.network.outside import outside_weights, tied_parameters
from quantize.spec.quant_spec import QuantSpec

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "F32": 0}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes one: its number in `gguf`, whether q and k rows are in the order of interleaved rotary pairs,
    and what its norms add to their stored gain (Gemma's are stored with the 1 that transformers adds when it computes).
    Of a mixture `fixed` has what a config must say, for llama.cpp computes that and has no field for it, and `alike` fields that must
    be equal.
    """

    number: gguf.MODEL_ARCH
    interleaved: bool = False
    norm_offset: float = 0.0
    mixture: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()
    alike: tuple[tuple[str, str], ...] = ()


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0),
    "mixtral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True, mixture=True),
    "qwen2_moe": Architecture(
        gguf.MODEL_ARCH.QWEN2MOE, mixture=True,
        fixed=(("norm_topk_prob", False), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "qwen3_moe": Architecture(
        gguf.MODEL_ARCH.QWEN3MOE, mixture=True,
        fixed=(("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "olmoe": Architecture(gguf.MODEL_ARCH.OLMOE, mixture=True, fixed=(("norm_topk_prob", False), ("clip_qkv", None)), alike=(("num_key_value_heads", "num_attention_heads"),)),
}  # fmt: skip
GEMMA_PERIOD, GEMMA_LOCAL_BASE = 6, 1e4
"""llama.cpp fixes Gemma3's pattern, every sixth layer full attention, and the rotary base of the others."""


@dataclass(frozen=True)
class Options:
    """What cannot be told from the model.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be told from the tokenizer.
    """

    pre: str | None = None


class Exporter:
    """Writes ``model.gguf``."""

    filename = "model.gguf"

    def __init__(self, options: Options):
        self.options = options

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme` with scales, and least values, that are exact in fp16."""
        overrides = tuple(
            Override(o.modules, {t: _half(s) if t == "weight" else s for t, s in o.tensors.items()})
            for o in scheme.overrides
        )
        return replace(
            scheme,
            weight=_half(scheme.weight),
            embedding=_half(scheme.embedding),
            head=_half(scheme.head),
            overrides=overrides,
        )

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses other models than llama.cpp computes from this file, and weights that no block format holds."""
        _check_model(network)
        nearest = _nearest(scheme)
        refuse_attention(scheme, "gguf", nearest)
        for name, specs in specs_by_linear(scheme, network).items():
            if specs.input is not None:
                raise UserError(f"scheme.input: quantized for {name}, but gguf holds weights only: use {nearest}")
            if specs.weight is not None:
                _check_weight(specs.weight, name, network.shapes[name][1], nearest)
        _check_experts(scheme, network)
        for weight in outside_weights(scheme, network):
            if weight.spec is not None:
                _check_weight(weight.spec, weight.name, weight.shape[1], nearest, f"scheme.{weight.tensor}")
        return ()

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the file, a tensor in memory at a time."""
        self.check(source.scheme, source.network)
        config = source.network.model.config
        architecture = ARCHITECTURES[config.model_type]
        moved: list[float] = []

        def fill(temporary: pathlib.Path) -> None:
            writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture.number])
            rows = source.network.model.get_input_embeddings().num_embeddings
            add_sizes(writer, config, type(source.network.model).__name__, rows)
            if source.origin is not None:
                copy_tokenizer(writer, source.origin)
            else:
                add_tokenizer(writer, source.tokenizer, rows, self.options.pre)
            plan = list(_tensors(source, architecture, moved))
            for tensor in plan:
                writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.bytes, tensor.type)
            quantized = Counter(t.type.name for t in plan if t.name.startswith("blk.") and len(t.shape) > 1)
            writer.add_file_type(FILE_TYPES[quantized.most_common(1)[0][0]])
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in plan:
                writer.write_tensor_data(tensor.read())
            writer.close()

        write_atomic(path, fill)
        notes = []
        if max(moved, default=0.0) > 0:
            notes.append(
                f"scales were rounded to fp16: weights moved by at most {max(moved):.3g}; "
                "a run with export=gguf computes with such scales"
            )
        return Exported(path, path.stat().st_size, tuple(notes))


def _half(spec: QuantSpec | None) -> QuantSpec | None:
    if spec is None or not spec.affine or (not spec.symmetric and spec.bits > 6):
        return spec
    return replace(spec, scales="float16" if spec.symmetric else "float16_min")


def _nearest(scheme: SchemeConfig) -> str:
    """Returns the nearest shipped scheme: Q4_0 or Q8_0."""
    bits = 4 if most_weight_bits(scheme) <= 4 else 8
    return advice(f"scheme=w{bits}a16_g{BLOCK}", f"bits: {bits}, granularity: group, group_size: {BLOCK}", None)


def _check_weight(spec: QuantSpec, name: str, columns: int, nearest: str, path: str = "scheme.weight") -> None:
    if spec.format in TYPES:
        if not superblock_columns(columns):
            raise UserError(
                f"{path}.format: {spec.format!r} of {name}, whose rows of {columns} values are no whole superblocks of 256: "
                f"give it another format by an override, or use {nearest}"
            )
        return
    bits = tuple(range(2, 9)) if spec.symmetric else (2, 3, 4)
    granularity = ("tensor", "channel", "group")
    require(spec, path, name, "gguf", nearest, format=("int",), bits=bits, granularity=granularity)
    if columns % BLOCK:
        raise UserError(
            f"{path}: {name} has rows of {columns} values, and gguf's blocks hold {BLOCK}: "
            + ("exclude it (scheme.exclude)" if path == "scheme.weight" else "use null")
        )
    if spec.group_size is not None and spec.group_size % BLOCK:
        raise UserError(
            f"{path}.group_size: {spec.group_size} of {name} is no multiple of gguf's {BLOCK}: use {nearest}"
        )


def _check_experts(scheme: SchemeConfig, network: Network) -> None:
    """Refuses experts that llama.cpp holds in one tensor, and that the scheme gives several formats."""
    specs = specs_by_linear(scheme, network)
    first: dict[str, str] = {}
    for name, whole in _stacked(network).items():
        other = first.setdefault(whole, name)
        if (a := specs[name].weight) != (b := specs[other].weight):
            kinds = " and ".join("16 bits" if spec is None else type_of(spec) for spec in (b, a))
            raise UserError(
                f"scheme.overrides: {other} and {name} have other formats ({kinds}), and gguf holds all experts of a block in one "
                f"tensor of one format: use a pattern such as {whole.rpartition('.')[0]}.*"
            )


def _stacked(network: Network) -> dict[str, str]:
    """Returns, by the full name of an expert's Linear, that of the tensor which holds all experts' (no number in it)."""
    return {
        name: f"{expert.rpartition('.')[0]}{name.removeprefix(expert)}"
        for block in network.blocks
        for expert, names in block.experts.items()
        for name in names
    }


def _check_model(network: Network) -> None:
    config = network.model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"export: gguf is written for {', '.join(ARCHITECTURES)}, and the model's model_type is {config.model_type!r}: "
            "use another format"
        )
    rope = config.rope_parameters or {}
    expected: list[tuple[str, Any, Any]] = []
    for part in (rope.get("full_attention", rope), rope.get("sliding_attention", {})):
        expected.append(("rope_parameters.rope_type", part.get("rope_type", "default"), "default"))
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    layers = getattr(config, "layer_types", None) or ()
    if config.model_type == "gemma3_text":
        pattern = ["full_attention" if (i + 1) % GEMMA_PERIOD == 0 else "sliding_attention" for i in range(len(layers))]
        local = rope.get("sliding_attention", {}).get("rope_theta")
        expected += [
            ("hidden_activation", act, "gelu_pytorch_tanh"), ("layer_types", list(layers), pattern),
            ("rope_parameters.sliding_attention.rope_theta", float(local), GEMMA_LOCAL_BASE),
            ("query_pre_attn_scalar", config.query_pre_attn_scalar, config.head_dim),
            ("final_logit_softcapping", config.final_logit_softcapping, None),
            ("attn_logit_softcapping", config.attn_logit_softcapping, None),
        ]  # fmt: skip
    else:
        window = getattr(config, "sliding_window", None)
        sliding = "sliding_attention" in layers or (config.model_type in {"mistral", "mixtral"} and window is not None)
        expected += [("hidden_act", act, "silu"), ("sliding_window", window if sliding else None, None)]
    expected += [
        (field, getattr(config, field, None), wanted) for field, wanted in ARCHITECTURES[config.model_type].fixed
    ]
    expected += [(a, getattr(config, a), getattr(config, b)) for a, b in ARCHITECTURES[config.model_type].alike]
    for field, value, wanted in expected:
        if value != wanted:
            raise UserError(
                f"export: gguf has no place for {field} {value!r}: llama.cpp computes this architecture with {wanted!r}: "
                "use another format"
            )
    names = _names(network)
    unknown = next((n for n, _ in network.model.named_parameters() if names(n) is None), None)
    if unknown is not None:
        raise UserError(f"export: llama.cpp's {config.model_type} has no tensor for {unknown}: use another format")


def _names(network: Network) -> Callable[[str], str | None]:
    """Returns the function from transformers' name of a parameter to GGUF's, None where there is none; experts have one together."""
    stacked = _stacked(network)
    architecture = ARCHITECTURES[network.model.config.model_type]
    table = gguf.get_tensor_name_map(architecture.number, len(network.blocks))

    def name_of(name: str) -> str | None:
        owner, _, last = name.rpartition(".")
        name = f"{stacked[owner]}.{last}" if owner in stacked else name
        return table.get_name(name, try_suffixes=(".weight", ".bias"))

    return name_of


@dataclass(frozen=True)
class _Tensor:
    """One tensor to come: what the header says of it, and how it is read when its turn is there."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    bytes: int
    type: gguf.GGMLQuantizationType
    read: Callable[[], np.ndarray]


def _tensors(source: QuantizedTensors, architecture: Architecture, moved: list[float]) -> Iterator[_Tensor]:
    """Yields every tensor in the order of the model; `moved` gathers what rounding scales to fp16 did."""
    model, names = source.network.model, _names(source.network)
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = tied_parameters(model)
    specs = {name: s.weight for name, s in specs_by_linear(source.scheme, source.network).items()}
    outside = {w.name: w for w in outside_weights(source.scheme, source.network) if w.spec is not None}
    stacked, gates = _stacked(source.network), {name for block in source.network.blocks for name in block.gates}
    together: dict[str, list[str]] = {}
    for linear, whole in stacked.items():
        together.setdefault(whole, []).append(linear)
    for name in _parameters(source):
        owner, _, last = name.rpartition(".")
        turned = heads.get(owner.rpartition(".")[2]) if architecture.interleaved and owner in specs else None
        stored = names(name)
        if name in tied or stored is None:
            continue
        if owner in stacked:
            if together[stacked[owner]][0] == owner:
                yield _experts(source, stored, together[stacked[owner]], specs[owner], moved)
            continue
        spec = specs.get(owner) if last == "weight" else None
        if last == "weight" and owner in outside:
            spec = outside[owner].spec
        if spec is not None:
            rows, columns = outside[owner].shape if owner in outside else source.network.shapes[owner]
            kind = gguf.GGMLQuantizationType[type_of(spec)]
            values, held = gguf.GGML_QUANT_SIZES[kind]
            size = held * columns // values

            def read(owner: str = owner, turned: int | None = turned, spec: QuantSpec = spec) -> np.ndarray:
                own = owner in outside
                found = rounded(owner, source.tensor(f"{owner}.weight"), spec) if own else source.linear(owner)
                blocks, change = blocks_of(found)
                moved.append(change)
                return blocks if turned is None else unpermuted(torch.from_numpy(blocks), turned).numpy()

            yield _Tensor(stored, (rows, size), np.dtype(np.uint8), rows * size, kind, read)
        else:
            norm = 0.0 if owner in specs or last != "weight" else architecture.norm_offset
            # In 16 bits a router would have its input rounded too, and choose other experts.
            yield _plain(stored, _reader(source, owner, last, owner in specs, norm, turned), owner in gates)


def _experts(
    source: QuantizedTensors, stored: str, names: list[str], spec: QuantSpec | None, moved: list[float]
) -> _Tensor:
    """Returns one matrix of all experts of a block, whose Linears are `names`, as one tensor (experts, out, in)."""
    if spec is None:
        return _plain(
            stored, lambda: torch.stack([torch.as_tensor(source.linear(n).weight).detach().cpu() for n in names])
        )
    rows, columns = source.network.shapes[names[0]]
    kind = gguf.GGMLQuantizationType[type_of(spec)]
    values, held = gguf.GGML_QUANT_SIZES[kind]
    shape = (len(names), rows, held * columns // values)

    def read() -> np.ndarray:
        whole = np.empty(shape, np.uint8)
        for place, name in zip(whole, names, strict=True):
            place[...], change = blocks_of(source.linear(name))
            moved.append(change)
        return whole

    return _Tensor(stored, shape, np.dtype(np.uint8), math.prod(shape), kind, read)


def _parameters(source: QuantizedTensors) -> Iterator[str]:
    """Yields the names of the model's parameters as they were before Linears were replaced."""
    linears = source.network.linears
    for owner, module in source.network.model.named_modules():
        if owner in linears:
            yield f"{owner}.weight"
            if getattr(linears[owner], "bias", None) is not None:
                yield f"{owner}.bias"
        elif not any(owner.startswith(f"{name}.") for name in linears):
            yield from (f"{owner}.{n}" if owner else n for n, _ in module.named_parameters(recurse=False))


def _reader(
    source: QuantizedTensors, owner: str, last: str, linear: bool, norm: float, turned: int | None
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        if linear:
            tensors: LinearTensors = source.linear(owner)
            value = torch.as_tensor(tensors.weight if last == "weight" else tensors.bias)
        else:
            value = source.tensor(f"{owner}.{last}" if owner else last)
        if value.dim() == 1:
            value = value.float() + norm
        if turned is not None:
            value = unpermuted(value.reshape(len(value), -1), turned).reshape(value.shape)
        return value.detach().cpu()

    return read


def _plain(name: str, read: Callable[[], torch.Tensor], wide: bool = False) -> _Tensor:
    """Returns an unquantized tensor: fp32 with one dimension or where it is to be `wide`, else 16 bits where that loses nothing."""
    value = read()
    kinds = gguf.GGMLQuantizationType
    kind = kinds.F32
    if value.dim() > 1 and not wide:
        exact = (
            k
            for k, t in ((kinds.F16, torch.float16), (kinds.BF16, torch.bfloat16))
            if torch.equal(value.to(t).to(value.dtype), value)
        )
        kind = next(exact, kinds.F32)

    def array() -> np.ndarray:
        tensor = read()
        if kind == kinds.BF16:
            return tensor.bfloat16().contiguous().view(torch.uint16).numpy()
        return (tensor.half() if kind == kinds.F16 else tensor.float()).contiguous().numpy()

    # Of a raw type the writer takes the shape as it is, unless it is given bytes.
    size = value.numel() * (4 if kind == kinds.F32 else 2)
    return _Tensor(name, tuple(value.shape), np.dtype(np.float32), size, kind, array)
