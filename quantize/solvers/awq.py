"""AWQ's search of a scale per input channel (Lin et al. 2023, equations 4 and 5), its output error taken from moments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quantize.checks import all_finite
from quantize.kernels.matmul import row_squares

RATIOS = tuple(i / 20 for i in range(20))
"""Exponents of the search grid: 0, 0.05, ..., 0.95."""
FLOOR = 1e-4
"""Least mean magnitude, as a share of the greatest: a channel below it would get a scale out of all proportion."""

Quantized = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Gives what a weight (out, in) becomes when it is quantized for inputs with a Hessian (in, in): both already scaled."""


@dataclass(frozen=True)
class AwqScale:
    """What the search chose.

    Attributes:
        scale: what the columns of the weights are multiplied by and the input is divided by, float32 (in,).
        ratio: exponent r that gave it.
        errors: output error with each exponent, relative to the output's energy, in the order of the exponents.
    """

    scale: torch.Tensor
    ratio: float
    errors: list[float]


def scale_of(mean_magnitude: torch.Tensor, ratio: float) -> torch.Tensor:
    """Returns s = mean|x|^r / sqrt(max s · min s), float32 (channels,); 1 for channels that no token used.

    Args:
        mean_magnitude: mean of |x| of each channel over all tokens, (channels,).
        ratio: r, from 0 (all ones) to 1.
    """
    mean = mean_magnitude.float()
    used = mean > 0
    if not bool(used.any()):
        return torch.ones_like(mean)
    scale = (mean / mean.amax()).clamp_min(FLOOR).pow(ratio)
    alive = scale[used]
    return torch.where(used, scale / (alive.amax() * alive.amin()).sqrt(), torch.ones_like(scale))


@torch.no_grad()
def awq_scale(
    mean_magnitude: torch.Tensor,
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    quantized: Quantized,
    ratios: Sequence[float] = RATIOS,
) -> AwqScale:
    """Returns the scale with which the Linears that read one tensor keep their outputs best, the first on ties.

    The error tr(D H D^T), D = W - Q(W s) / s, is what replaying the tokens would give: no data is needed.

    Args:
        mean_magnitude: mean of |x| of each channel, (in,).
        weights: of all Linears that read the tensor, each (out, in).
        hessian: H = 2 X^T X / n, (in, in).
        quantized: rounding to nearest, or a solver.
        ratios: exponents to try; with 0 among them the result is never worse than no scale.

    Raises:
        ValueError: for shapes that do not fit, NaN or inf, or no weight or ratio.
    """
    size = len(mean_magnitude)
    if not weights or not ratios:
        raise ValueError("weights, ratios: expected one or more of each")
    if hessian.shape != (size, size) or any(w.ndim != 2 or w.shape[1] != size for w in weights):
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"weights: {shapes} and hessian {tuple(hessian.shape)} do not fit {size} channels")
    if not (all_finite(mean_magnitude) and all_finite(hessian)):
        raise ValueError("mean_magnitude, hessian: NaN or inf")
    hessian, wide = hessian.float(), [w.float() for w in weights]
    energy = sum(float(row_squares(w, hessian).sum()) for w in wide)
    errors = []
    for ratio in ratios:
        scale = scale_of(mean_magnitude, ratio)
        scaled = hessian / scale[:, None] / scale
        lost = [row_squares(w - quantized(w * scale, scaled) / scale, hessian).clamp_(min=0).sum() for w in wide]
        errors.append(float(torch.stack(lost).sum()) / energy if energy else 0.0)
    best = min(range(len(errors)), key=errors.__getitem__)
    return AwqScale(scale_of(mean_magnitude, ratios[best]), ratios[best], errors)
