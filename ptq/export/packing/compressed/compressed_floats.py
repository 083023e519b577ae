"""Floats of 4 and 8 bits in compressed-tensors' words: FP8, NVFP4, MXFP4 and MXFP8, under the names that vLLM reads."""

from dataclasses import dataclass
from typing import Any

import torch

from quantize.codecs.base import Encoded
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class FloatFormat:
    """How a format is written.

    Attributes:
        name: of a config group's format.
        bits: of an element.
        granularities: that a weight may have.
        inputs: formats that its inputs may have, and the granularities of these.
        strategy: the package's word for the granularity group, where it is another.
        scale_type: type of the scales in the file, where it is not the model's.
        packed: whether two elements share a byte.
    """

    name: str
    bits: int
    granularities: tuple[str, ...]
    inputs: dict[str, tuple[str, ...]]
    strategy: str | None = None
    scale_type: torch.dtype | None = None
    packed: bool = False


FORMATS = {
    "fp8_e4m3": FloatFormat("float-quantized", 8, ("tensor", "channel"), {"fp8_e4m3": ("token", "tensor")}),
    "nvfp4": FloatFormat(
        "nvfp4-pack-quantized", 4, ("group",), {"nvfp4": ("group",)}, "tensor_group", torch.float8_e4m3fn, True
    ),
    "mxfp4": FloatFormat("mxfp4-pack-quantized", 4, ("group",), {"mxfp4": ("group",)}, None, torch.uint8, True),
    "mxfp8": FloatFormat("mxfp8-quantized", 8, ("group",), {"mxfp8": ("group",)}, None, torch.uint8),
}
DECODED_TO_BFLOAT16 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
"""Formats whose compressor gives weights in bfloat16, whatever type the model has."""


def format_name(weight: QuantSpec, inputs: QuantSpec | None) -> str:
    """Returns the format of a config group; FP8 weights alone are what the package calls naive."""
    return "naive-quantized" if weight.format == "fp8_e4m3" and inputs is None else FORMATS[weight.format].name


def arguments(spec: QuantSpec, inputs: bool = False) -> dict[str, Any]:
    """Returns what ``QuantizationArgs`` is given for a weight, or for `inputs`, of one of `FORMATS`."""
    form = FORMATS[spec.format]
    # The package's word for scales of each call under one of the tensor that is not.
    local = inputs and form.strategy == "tensor_group"
    words: dict[str, Any] = {
        "num_bits": form.bits, "type": "float", "symmetric": True, "group_size": spec.group_size,
        "dynamic": "local" if local else spec.dynamic, "strategy": form.strategy or spec.granularity,
    }  # fmt: skip
    return words if form.scale_type is None else {**words, "scale_dtype": form.scale_type, "zp_dtype": form.scale_type}


def state(stored: Encoded, spec: QuantSpec) -> dict[str, torch.Tensor]:
    """Returns the tensors of a weight as the format's own compressor names them, of what our codec stores: the same bits."""
    form = FORMATS[spec.format]
    found = {"weight_packed" if form.packed else "weight": stored["codes"], "weight_scale": stored["scale"]}
    if "tensor_scale" in stored:
        found["weight_global_scale"] = _divisor(stored["tensor_scale"])
    return found


def input_state(scale: torch.Tensor, spec: QuantSpec) -> dict[str, torch.Tensor]:
    """Returns the scale of a static range of inputs, floats or integers, as the package names it; a copy."""
    # Linears that read one tensor share its range, and a shard takes no two names for one storage.
    form = FORMATS.get(spec.format)
    if form is not None and form.strategy == "tensor_group":
        return {"input_global_scale": _divisor(scale.reshape(1))}
    return {"input_scale": scale.reshape(1).clone()}


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """Returns what the package divides by where the codec multiplies by `scale`, which is 0 for a tensor of zeros."""
    return torch.where(scale > 0, 1 / scale, torch.ones_like(scale))


def input_refusal(weight: QuantSpec, inputs: QuantSpec) -> str | None:
    """Returns in a few words why inputs of this format go with no weight of that one, or None."""
    form = FORMATS.get(weight.format)
    allowed = {} if form is None else form.inputs
    if inputs.granularity in allowed.get(inputs.format, ()):
        return None
    return f"a weight of {weight.format} goes with inputs of " + (
        " or ".join(f"{name} a {' or '.join(words)}" for name, words in allowed.items()) or "no float format"
    )
