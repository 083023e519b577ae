"""HQQ (Badri and Shaji 2023): ranges by half-quadratic splitting on the weight alone, no calibration data."""

from dataclasses import replace

import torch

from quantize.checks import all_finite
from quantize.grid.affine import Grid
from quantize.grid.ranges import weight_grid
from quantize.grid.scales import rounded_scales
from quantize.spec.quant_spec import QuantSpec

ITERATIONS = 20
NORM = 0.7
"""p of the lp norm: below 1, so that a few great errors weigh less than many small ones."""
BETA = 10.0
"""How strongly errors are held together at first; grows by `GROWTH` an iteration."""
GROWTH = 1.01


def shrunk(error: torch.Tensor, beta: float, norm: float = NORM) -> torch.Tensor:
    """Returns the generalised soft threshold sign(x) max(|x| - |x|^(p - 1) / beta, 0): the lp part's minimum, to first order."""
    magnitude = error.abs()
    # 0^(p - 1) is inf: its threshold leaves 0.
    return torch.sign(error) * (magnitude - magnitude.pow(norm - 1) / beta).clamp_(min=0)


@torch.no_grad()
def hqq_grid(
    weight: torch.Tensor,
    spec: QuantSpec,
    labels: torch.Tensor | None = None,
    iterations: int = ITERATIONS,
    norm: float = NORM,
) -> Grid:
    """Returns the grid with the least sum |W - Q|^p met on the way, shaped as `weight_grid`'s: never above minmax's.

    Alternates the errors e = shrunk(W - Q), then the zero point z = mean(q - (W - e) / s) and the scale s, the least squares
    fit of W - e to q - z. Errors are measured in steps of the grid, so that the size of the weight changes nothing; the zero
    point stays a whole number and the scale moves, where the published method keeps the scale and a fractional zero point.

    Args:
        weight: (out, in), any floating type.
        spec: an integer format, whose range estimator is minmax here.
        labels: cluster of each column, with granularity cluster.
        iterations: of the alternation, 0 or more.
        norm: p, above 0, at most 1.

    Raises:
        ValueError: for NaN or inf in the weight, p outside its range, or as `weight_grid`.
    """
    if not 0 < norm <= 1:
        raise ValueError(f"norm: {norm!r} is not valid: expected a number above 0, up to 1, such as 0.7")
    if not all_finite(weight):
        raise ValueError("weight: holds NaN or inf")
    weight = weight.float()
    if spec.granularity == "cluster" and labels is not None:
        grid = weight_grid(weight, replace(spec, range="minmax"), labels)
        columns = [(labels == k).nonzero().squeeze(1) for k in range(grid.scale.shape[1])]
        one_a_row = replace(spec, granularity="channel")
        parts = [hqq_grid(weight[:, m], one_a_row, None, iterations, norm) for m in columns]
        points = [part.zero_point for part in parts if part.zero_point is not None]
        scale = torch.cat([part.scale for part in parts], dim=1)
        return Grid(scale, torch.cat(points, dim=1) if points else None, grid.low, grid.high)
    plain = weight_grid(weight, replace(spec, range="minmax"), labels)
    values = weight.flatten() if spec.granularity == "tensor" else weight
    values = values.unflatten(-1, (-1, spec.group_size)) if spec.granularity == "group" else values  # type: ignore[arg-type]
    return _alternated(values, plain, spec, iterations, norm)


def _alternated(values: torch.Tensor, plain: Grid, spec: QuantSpec, iterations: int, norm: float) -> Grid:
    """Returns the best grid met; `values` (..., size) share the scales (..., 1) of `plain`."""
    scale, best_error = plain.scale, torch.full_like(plain.scale, torch.inf)
    zero = torch.zeros_like(scale) if plain.zero_point is None else plain.zero_point
    best_scale, best_zero, beta = scale, zero, BETA
    for iteration in range(iterations + 1):
        codes = (values / scale).round_().add_(zero).clamp_(plain.low, plain.high)
        steps = values / scale - (codes - zero)
        error = (steps.abs().pow_(norm) * scale.pow(norm)).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        if iteration == iterations:
            break
        wanted = values / scale - shrunk(steps, beta, norm)
        if plain.zero_point is not None:
            zero = (codes - wanted).mean(-1, keepdim=True).round_().clamp_(plain.low, plain.high)
        levels = codes - zero
        weight = levels.square().sum(-1, keepdim=True)
        factor = (levels * wanted).sum(-1, keepdim=True) / torch.where(weight > 0, weight, torch.ones_like(weight))
        moved = torch.where((weight > 0) & (factor > 0), scale * factor, scale)
        scale = rounded_scales(Grid(moved, None, plain.low, plain.high), moved, spec.scales).scale
        beta *= GROWTH
    return Grid(best_scale, None if plain.zero_point is None else best_zero, plain.low, plain.high)
