"""E2M1, the 4-bit float of FP4, MXFP4 and NVFP4: ±{0, .5, 1, 1.5, 2, 3, 4, 6} (OCP Microscaling Formats 1.0, section 5.3.3)."""

import torch

E2M1_MAX = 6.0


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` rounded to E2M1, half to the even mantissa, saturating at ±6; NaN stays NaN."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    step = _step(magnitude)
    return torch.copysign((magnitude / step).round_().mul_(step), x)


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Returns the codes, uint8: the sign in bit 3, exponent in bits 2 and 1, mantissa in bit 0; NaN gives 0."""
    values = round_e2m1(x)
    magnitude = values.abs()
    # Each octave has two codes: below 2 the codes count halves, up to 4 ones, then twos.
    code = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return (code.nan_to_num_(0) + 8 * (values < 0)).to(torch.uint8)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values of `codes`."""
    code = (codes & 7).float()
    magnitude = torch.where(code < 4, code / 2, torch.where(code < 6, code - 2, 2 * code - 8))
    return torch.where(codes >= 8, -magnitude, magnitude)


def _step(magnitude: torch.Tensor) -> torch.Tensor:
    """Returns the distance of neighbouring values around `magnitude` (0 .. 6): .5, 1 or 2."""
    half = torch.full_like(magnitude, 0.5)
    return torch.where(magnitude < 2, half, torch.where(magnitude < 4, 2 * half, 4 * half))
