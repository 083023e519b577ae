"""Q8_0: int8 absmax in groups. Two forms share the name (METHODS.md section 1): llama2.c's flat groups with float32 scales,
which KuiperLLama stores too, and GGUF's blocks of 32 with fp16 scales.
"""

import math
from collections.abc import Sequence

import torch

from quantize.codecs.base import (
    Codec,
    Encoded,
    Layout,
    absmax,
    checked,
    divided,
    flat_blocks,
    register,
    saturated,
    scale_shape,
)
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec

GREATEST = 127
FP16_MAX = torch.finfo(torch.float16).max


def encode_flat(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Quantizes `weight` in flat row-major groups: scale ``max|w| / 127``, code ``round(w / scale)``, half to even.

    An all-zero group, or one whose scale is below float32's normal numbers, gets scale 1 and codes 0.

    Args:
        weight: floating point, any shape.
        group_size: values in a group; divides the number of values.

    Returns:
        Codes int8 (n,), scales float32 (n / group_size,), and the greatest absolute error over all values.

    Raises:
        ValueError: for a group size that does not divide the number of values, or NaN or inf in the weight.
    """
    weight = checked(weight)
    codes, scale = _codes_and_scales(weight, group_size)
    error = (decode_flat(codes, scale) - weight.float().reshape(-1)).abs_()
    return codes, scale, float(error.max()) if len(error) else 0.0


def decode_flat(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values (n,) that `codes` (n,) and `scales` (groups,) stand for."""
    return saturated((codes.reshape(len(scales), -1).float() * scales.float()[:, None]).reshape(-1), torch.float32)


def _codes_and_scales(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = weight.numel()
    if group_size < 1 or count % group_size:
        raise ValueError(f"group_size: {group_size} does not divide the {count} values of the tensor")
    groups = flat_blocks(weight.float(), group_size)
    scale = absmax(groups) / GREATEST
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return (groups / scale).round_().to(torch.int8).reshape(-1), scale.reshape(-1)


class FlatQ8(Codec):
    """llama2.c's form: the groups run through the rows, so the group size divides all values, not each row."""

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, in) and scales (groups,)."""
        size = spec.group_size or 1
        if math.prod(shape) % size:
            raise ValueError(f"group_size: {size} does not divide the {math.prod(shape)} values of the tensor")
        return {"codes": (tuple(shape), torch.int8), "scale": ((math.prod(shape) // size,), torch.float32)}

    def rows(self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], index: torch.Tensor) -> Encoded:
        """As `Codec.rows`, where no group crosses the end of a row."""
        if shape[1] % (spec.group_size or 1):
            raise ValueError(f"group_size: {spec.group_size} does not divide the {shape[1]} columns of a row")
        scale = stored["scale"].view(shape[0], -1)[index].flatten()
        return {**super().rows({"codes": stored["codes"]}, spec, shape, index), "scale": scale}

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes int8 in the shape of `x`; scales float32 (groups,)."""
        codes, scale = _codes_and_scales(x, spec.group_size or 1)
        return {"codes": codes.view(x.shape), "scale": scale}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Code times scale."""
        return decode_flat(parts["codes"], parts["scale"]).view(*shape)


class GgufQ8(Codec):
    """GGUF's form: blocks of 32 of a row, fp16 scales; 34 bytes a block."""

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, in) and scales (out, blocks)."""
        return {"codes": (tuple(shape), torch.int8), "scale": (scale_shape(shape, spec), torch.float16)}

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes int8 (..., n), rounded half away from zero on the scale before its own rounding; scales fp16 (..., blocks)."""
        blocks = grouped(x, spec)
        scale = absmax(blocks) / GREATEST
        stored = saturated(scale, torch.float16)
        # Times the inverse, as ggml-quants.c does it: a division rounds some ties to the other side.
        inverse = divided(torch.ones_like(scale), torch.where(scale > FP16_MAX, stored.float(), scale))
        values = blocks.float() * inverse
        whole = values.abs().floor()
        whole += (2 * (values.abs() - whole)).floor_()
        codes = torch.copysign(whole.clamp_(max=GREATEST), values).to(torch.int8)
        return {"codes": codes.view(x.shape), "scale": stored.squeeze(-1)}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Code times scale."""
        return (grouped(parts["codes"].float(), spec) * parts["scale"].float().unsqueeze(-1)).reshape(shape)


Q8_0 = FlatQ8()
Q8_0_GGUF = GgufQ8()
_INSTEAD = "int with granularity group"
register("q8_0", Format((8,), ("group",), 64, activation=False, instead=_INSTEAD), Q8_0)
register("q8_0_gguf", Format((8,), ("group",), 32, True, activation=False, instead=_INSTEAD), Q8_0_GGUF)
