"""Scales as a file keeps them: a grid whose scale, and least value where there is one, fit into fp16 exactly."""

import torch

from quantize.grid.affine import Grid

FP16_DIGITS = 11
"""Binary digits of an fp16 number."""
_LEAST, _MOST = 2.0**-24, 65504.0


def rounded_scales(grid: Grid, minimum: torch.Tensor, scales: str) -> Grid:
    """Returns `grid` with scales of the type `scales`; the zero point follows the new scale.

    ``float16_min`` keeps ``11 - bits`` binary digits of a scale, so that its product with any zero point has at most 11:
    the range then ends within 1 / 2^(11 - bits) of where it would have.

    Args:
        grid: fitted in float32.
        minimum: least value of each range, in the scale's shape.
        scales: ``float32``, ``float16`` or ``float16_min`` (`quantize.spec.quant_spec`).
    """
    if scales == "float32":
        return grid
    scale = grid.scale.clamp(_LEAST, _MOST)
    if scales == "float16_min":
        mantissa, exponent = torch.frexp(scale)
        digits = FP16_DIGITS - int(grid.high - grid.low).bit_length()
        scale = torch.ldexp((mantissa * 2**digits).round_() / 2**digits, exponent)
        # The product with the greatest zero point must stay finite.
        scale = scale.clamp(max=2.0 ** (15 - int(grid.high - grid.low).bit_length()))
    scale = scale.half().float()
    if grid.zero_point is None:
        return Grid(scale, None, grid.low, grid.high)
    zero_point = (-minimum.float().clamp(max=0) / scale).round_().clamp_(grid.low, grid.high)
    return Grid(scale, zero_point, grid.low, grid.high)
