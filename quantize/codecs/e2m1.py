"""E2M1, the 4-bit float of FP4, MXFP4 and NVFP4: ±{0, .5, 1, 1.5, 2, 3, 4, 6} (OCP Microscaling Formats 1.0, section 5.3.3)."""

import torch

E2M1_MAX = 6.0
EXPONENT = 0x7F800000
"""The bits of a float32's exponent: of a positive number they are the power of two at or below it."""


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` rounded to E2M1, half to the even mantissa, saturating at ±6; NaN stays NaN."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    step = _step(magnitude)
    return torch.copysign((magnitude / step).round_().mul_(step), x)


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Returns the codes, uint8: the sign in bit 3, exponent in bits 2 and 1, mantissa in bit 0; NaN gives 0."""
    values = round_e2m1(x)
    magnitude = values.abs()
    # Each octave has two codes: below 2 the codes count halves, up to 4 ones, then twos; the least of the three lines is the one.
    code = torch.minimum(torch.minimum(2 * magnitude, magnitude + 2), magnitude.mul_(0.5).add_(4))
    return code.nan_to_num_(0).to(torch.uint8).add_(values < 0, alpha=8)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values of `codes`."""
    code = (codes & 7).float()
    magnitude = torch.maximum(torch.maximum(code / 2, code - 2), code.mul_(2).sub_(8))
    return magnitude.mul_(1 - 2 * (codes >> 3).to(torch.int8))


def _step(magnitude: torch.Tensor) -> torch.Tensor:
    """Returns the distance of neighbouring values around `magnitude` (0 .. 6): .5, 1 or 2, half the power of two at or below it."""
    power = magnitude.float().clamp(min=1).view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32)
    return power.mul_(0.5).to(magnitude.dtype)
