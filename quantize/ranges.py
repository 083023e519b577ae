"""How a grid's range is chosen: from the values themselves (minmax, percentile, mse) or from per-channel statistics."""

import torch

from quantize.affine import Grid, fake_quantize, grid_from_range, grouped
from quantize.spec import QuantSpec

CHUNK = 1 << 20
"""Values that the percentile and mse estimators look at together: bounds their temporaries to some tens of MiB."""

SHRINKS = 80
"""Range multipliers tried by the mse estimator: 1, 1 - 1/100, ..., 1 - 79/100."""


def weight_grid(weight: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of a weight (out, in); its shape broadcasts to ``grouped(weight, spec)``.

    Granularity tensor: one scale; channel: one a row; group: one for `group_size` consecutive values of a row.

    Raises:
        ValueError: for granularity token (a weight has none), or a group size that does not divide the columns.
    """
    if spec.granularity == "token":
        raise ValueError("granularity: 'token' is for activations: use channel for one scale a row of a weight")
    x = grouped(weight, spec)
    return _fit(x.flatten() if spec.granularity == "tensor" else x, spec)


def dynamic_grid(x: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of an activation (..., channels) from its own values: one a call (tensor), row (token) or group.

    Raises:
        ValueError: for granularity channel (its ranges come from statistics: `static_grid`), or a group size that does
            not divide the channels.
    """
    if spec.granularity == "channel":
        raise ValueError("granularity: 'channel' has no dynamic ranges: use token, or static ranges from statistics")
    values = grouped(x, spec)
    return _fit(values.flatten() if spec.granularity == "tensor" else values, spec)


def static_grid(minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of an activation from per-channel statistics (channels,): one for the tensor, or one a channel.

    Raises:
        ValueError: for another granularity, or NaN or inf in the statistics.
    """
    if not (torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise ValueError("the static range holds NaN or inf: take the statistics again")
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
    ends = []
    for rows in _row_chunks(x.reshape(-1, size)):
        values = rows.float().sort(dim=-1).values
        # A copy, so that the sorted values go.
        ends.append(torch.stack([values[:, cut], values[:, size - 1 - cut]], dim=-1))
    low, high = torch.cat(ends).view(*x.shape[:-1], 2).split(1, dim=-1)
    return low, high


def _least_error(x: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns, for each scale of its own, the shrunk range with the least squared error; ties keep the wider range."""
    shape, size = minimum.shape, x.shape[-1]
    minimum, maximum = minimum.float().reshape(-1, 1), maximum.float().reshape(-1, 1)
    parts, start = [], 0
    for rows in _row_chunks(x.reshape(-1, size)):
        end = start + len(rows)
        parts.append(_best_shrink(rows, minimum[start:end], maximum[start:end], spec))
        start = end
    shrink = torch.cat(parts)
    return grid_from_range((minimum * shrink).view(shape), (maximum * shrink).view(shape), spec.bits, spec.symmetric)


def _best_shrink(x: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns the best multiplier (rows, 1) of the range (rows, 1) of each row of `x`."""
    best = torch.full_like(minimum, torch.inf)
    chosen = torch.ones_like(best)
    extent = torch.maximum(minimum.abs(), maximum.abs())
    extent = torch.where(extent == 0, torch.ones_like(extent), extent)
    for step in range(SHRINKS):
        shrink = 1 - step / 100
        grid = grid_from_range(minimum * shrink, maximum * shrink, spec.bits, spec.symmetric)
        error = torch.zeros_like(best)
        # One row may be a whole tensor: its error is summed piece by piece.
        for part in x.split(CHUNK, dim=-1):
            values = part.float()
            # Relative to the range, so that huge values do not overflow when squared.
            error += ((fake_quantize(values, grid) - values) / extent).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, torch.full_like(chosen, shrink), chosen)
    return chosen


def _row_chunks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits (rows, n) into pieces of whole rows that hold about `CHUNK` values."""
    return rows.split(max(1, CHUNK // max(1, rows.shape[-1])))
