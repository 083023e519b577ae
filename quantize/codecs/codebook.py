"""NF4 and FP4: 4-bit codes into a table of levels, absmax blocks, double quantization (Dettmers et al. 2023, QLoRA).

NF4's levels are quantiles of N(0, 1), more of them above 0 than below so that 0 itself is one (QLoRA, section 3). FP4's are
E2M1's, ±{0, .5, 1, 1.5, 2, 3, 4, 6}; the table that bitsandbytes calls FP4 is another one.
"""

import math
from collections.abc import Sequence

import torch

from quantize.codecs.base import (
    Codec,
    Encoded,
    Layout,
    absmax,
    divided,
    flat_blocks,
    packed_codes,
    register,
    scale_shape,
)
from quantize.codecs.e2m1 import E2M1_MAX, e2m1_codes, e2m1_values
from quantize.codecs.table import Table
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_TABLE = Table(NF4_LEVELS)
SCALES_PER_BLOCK = 256
"""Scales that share one scale of their own, with double quantization."""


class Codebook(Codec):
    """A 4-bit table with one absmax scale a group; `greatest` is the table's greatest level."""

    width = 4
    greatest = 1.0

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes, uint8, of values already divided by their scale."""
        levels = NF4_TABLE.on(x.device)
        # A value in the middle belongs to the lower level.
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the float32 levels of `codes`."""
        return NF4_TABLE.on(codes.device)[codes.int()]

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, bytes) and scales (out, groups); with `double_quant` int8 scales, their steps and their mean."""
        scales = scale_shape(shape, spec)
        layout: Layout = {"codes": packed_codes(shape, self.width), "scale": (scales, torch.float32)}
        if spec.double_quant:
            steps = -(-math.prod(scales) // SCALES_PER_BLOCK)
            layout["scale"] = (scales, torch.int8)
            layout.update(scale_step=((steps,), torch.float32), scale_mean=((1,), torch.float32))
        return layout

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes (..., n), and the scales (..., groups): themselves, or quantized in turn with `double_quant`."""
        groups = grouped(x, spec)
        scale = absmax(groups) / self.greatest
        # Times the inverse, as QLoRA's reference code does it: a division rounds some ties to the other side.
        codes = self.codes(groups.float() * divided(torch.ones_like(scale), scale)).view(x.shape)
        scale = scale.squeeze(-1)
        return {"codes": codes, **(quantize_scales(scale) if spec.double_quant else {"scale": scale})}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Level times scale."""
        scale = dequantize_scales(parts) if spec.double_quant else parts["scale"]
        groups = grouped(self.levels(parts["codes"]).view(shape), spec)
        return (groups * scale.unsqueeze(-1)).reshape(shape)


class E2M1Codebook(Codebook):
    """FP4: the 16 values of E2M1."""

    greatest = E2M1_MAX

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of E2M1."""
        return e2m1_codes(x)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of E2M1."""
        return e2m1_values(codes)


def quantize_scales(scale: torch.Tensor) -> Encoded:
    """Double quantization: the scales less their mean, as int8 with one float32 absmax scale for 256 of them.

    QLoRA keeps 8-bit floats of its own table here; the size is the same.
    """
    mean = scale.double().mean().float().reshape(1)
    blocks = flat_blocks(scale - mean, SCALES_PER_BLOCK)
    step = absmax(blocks) / 127
    codes = divided(blocks, step).round_().to(torch.int8).view(-1)[: scale.numel()].view(scale.shape)
    return {"scale": codes, "scale_step": step.view(-1), "scale_mean": mean}


def dequantize_scales(parts: Encoded) -> torch.Tensor:
    """Returns the float32 scales that `quantize_scales` stands for; never below 0."""
    codes = parts["scale"]
    values = flat_blocks(codes.float(), SCALES_PER_BLOCK) * parts["scale_step"].unsqueeze(-1)
    return (values.view(-1)[: codes.numel()].view(codes.shape) + parts["scale_mean"]).clamp_(min=0)


NF4 = Codebook()
FP4 = E2M1Codebook()
_FORM = Format((4,), ("group",), 64, activation=False, instead="mxfp4", double_quant=True)
register("nf4", _FORM, NF4)
register("fp4", _FORM, FP4)
