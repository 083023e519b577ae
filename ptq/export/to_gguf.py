"""GGUF for llama.cpp: LLaMA, Mistral, Qwen2, Gemma3 (text), and the mixtures Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE, with Q8_0,
Q4_0, Q4_1, K-quants and 16-bit weights, side by side.

Expresses: weights q4_k, q5_k and q6_k, with rows of whole superblocks of 256; weights int, symmetric up to 4 bits (Q4_0) or 8 (Q8_0), or with zero points up to 4 bits (Q4_1), in groups of
32 or of whole multiples of it, per channel or per tensor (a block of 32 repeats the scale that it shares); inputs and
attention unquantized, because the file does not say how a runtime rounds them. Embedding and head have
such a format too where the scheme gives them one; they and Linears left alone are stored in 16 bits where that loses nothing, norms,
biases and routers in fp32. The experts of a block are one tensor for each of their matrices, (experts, out, in), of one format.
"""

import pathlib
from dataclasses import dataclass, replace
from typing import Any

from ptq.config.schema import SchemeConfig
from ptq.config.scheme import with_weights
from ptq.errors import UserError
from ptq.export.base import Exported, advice, most_weight_bits, refuse_attention, require, specs_by_linear
from ptq.export.packing.gguf_architectures import ARCHITECTURES, names_of, stacked_experts
from ptq.export.packing.gguf_blocks import BLOCK, type_of
from ptq.export.packing.gguf_file import GgufFile
from ptq.export.packing.k_blocks import TYPES, superblock_columns
from ptq.export.quantized_tensors import QuantizedTensors
from ptq.files.atomic import write_atomic
from ptq.network.network import Network
from ptq.network.outside import outside_weights
from quantize.spec.quant_spec import QuantSpec

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
        return with_weights(scheme, _half)

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
        file = self.growing_file(source)

        def fill(temporary: pathlib.Path) -> None:
            for block in source.network.blocks:
                file.append(block, temporary)
            file.complete(temporary)

        write_atomic(path, fill)
        return file.exported(path)

    def growing_file(self, source: QuantizedTensors) -> GgufFile:
        """Returns what writes the file a finished block at a time."""
        self.check(source.scheme, source.network)
        return GgufFile(source, self.options.pre)


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
    for name, whole in stacked_experts(network).items():
        other = first.setdefault(whole, name)
        if (a := specs[name].weight) != (b := specs[other].weight):
            kinds = " and ".join("16 bits" if spec is None else type_of(spec) for spec in (b, a))
            raise UserError(
                f"scheme.overrides: {other} and {name} have other formats ({kinds}), and gguf holds all experts of a block in one "
                f"tensor of one format: use a pattern such as {whole.rpartition('.')[0]}.*"
            )


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
    names = names_of(network)
    unknown = next((n for n, _ in network.model.named_parameters() if names(n) is None), None)
    if unknown is not None:
        raise UserError(f"export: llama.cpp's {config.model_type} has no tensor for {unknown}: use another format")
