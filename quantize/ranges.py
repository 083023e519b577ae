"""How a grid's range is chosen: from the values themselves (minmax, percentile, mse) or from per-channel statistics."""

import torch

from quantize.affine import Grid, fake_quantize, grid_from_range, grouped
from quantize.spec import QuantSpec

SHRINKS = 80
"""Range multipliers tried by the mse estimator: 1, 1 - 1/100, ..., 1 - 79/100."""


def weight_grid(weight: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of a weight (out, in); its shape broadcasts to ``grouped(weight, spec)``.

    Granularity tensor: one scale; channel: one a row; group: one for `group_size` consecutive values of a row.
    """
    x = grouped(weight, spec)
    return _fit(x.flatten() if spec.granularity == "tensor" else x, spec)


def dynamic_grid(x: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of an activation (..., channels) from its own values: one a call (tensor), row (token) or group."""
    values = grouped(x, spec)
    return _fit(values.flatten() if spec.granularity == "tensor" else values, spec)


def static_grid(minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of an activation from per-channel statistics (channels,): one for the tensor, or one a channel."""
    if spec.granularity == "tensor":
        minimum, maximum = minimum.min().reshape(1), maximum.max().reshape(1)
    elif spec.granularity != "channel":
        raise ValueError(f"granularity: {spec.granularity!r} has no static ranges: use tensor or channel")
    return grid_from_range(minimum, maximum, spec.bits, spec.symmetric)


def _fit(x: torch.Tensor, spec: QuantSpec) -> Grid:
    if spec.range == "percentile":
        minimum, maximum = _percentiles(x, spec.percentile)
        return grid_from_range(minimum, maximum, spec.bits, spec.symmetric)
    # amin and amax in turn: torch.aminmax along a dimension is many times slower on CPU.
    minimum, maximum = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if spec.range == "mse":
        return _least_error(x, minimum, maximum, spec)
    return grid_from_range(minimum, maximum, spec.bits, spec.symmetric)


def _percentiles(x: torch.Tensor, percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the two values between which `percentile` percent of each last dimension lie, by order statistics."""
    size = x.shape[-1]
    cut = int(size * (100 - percentile) / 200)
    values = x.float().sort(dim=-1).values
    return values[..., cut : cut + 1], values[..., size - 1 - cut : size - cut]


def _least_error(x: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns, for each scale of its own, the shrunk range with the least squared error; ties keep the wider range."""
    best = torch.full_like(minimum, torch.inf, dtype=torch.float32)
    chosen = torch.ones_like(best)
    extent = _extent(minimum, maximum)
    for step in range(SHRINKS):
        shrink = 1 - step / 100
        grid = grid_from_range(minimum.float() * shrink, maximum.float() * shrink, spec.bits, spec.symmetric)
        # Relative to the range, so that huge values do not overflow when squared.
        error = ((fake_quantize(x, grid).float() - x.float()) / extent).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, torch.full_like(chosen, shrink), chosen)
    return grid_from_range(minimum.float() * chosen, maximum.float() * chosen, spec.bits, spec.symmetric)


def _extent(minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    extent = torch.maximum(minimum.float().abs(), maximum.float().abs())
    return torch.where(extent == 0, torch.ones_like(extent), extent)
