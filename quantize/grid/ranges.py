"""How a grid's range is chosen: from the values themselves (minmax, percentile, mse) or from per-channel statistics."""

from dataclasses import replace

import torch

from quantize.grid.affine import Grid, grid_from_range, grouped
from quantize.grid.scales import rounded_scales
from quantize.spec.quant_spec import QuantSpec

CHUNK, CPU_CHUNK = 1 << 20, 1 << 18
"""Values that the percentile and mse estimators look at together. On a CPU their temporaries, 1 MiB each, stay in its caches: twice as fast."""

SHRINKS = 80
"""Range multipliers tried by the mse estimator: 1, 1 - 1/100, ..., 1 - 79/100."""


def weight_grid(
    weight: torch.Tensor,
    spec: QuantSpec,
    labels: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> Grid:
    """Returns the grid of a weight (out, in); its shape broadcasts to ``grouped(weight, spec)``.

    Granularity tensor: one scale; channel: one a row; group: one for `group_size` consecutive values of a row; cluster:
    one for the values of a row whose columns have one label, (out, clusters), to be spread by `Grid.of_channels`.

    Args:
        weight: (out, in).
        spec: the number format.
        labels: cluster of each column, int64 (in,), all of 0 .. clusters - 1 in use; only with granularity cluster.
        importance: what a squared error in each column weighs, (in,), 0 or more; with range mse only. None weighs all alike.

    Raises:
        ValueError: for granularity token (a weight has none), a group size that does not divide the columns, or
            granularity cluster without labels.
    """
    weighing = None if importance is None else importance.float().expand(weight.shape)
    if spec.granularity == "cluster":
        members = [labels == k for k in range(_clusters(labels, weight.shape[1]))]  # type: ignore[arg-type]
        parts = [_fit(weight[:, m], spec, None if weighing is None else weighing[:, m]) for m in members]  # type: ignore[index]
        scale = torch.cat([part.scale for part in parts], dim=1)
        points = [part.zero_point for part in parts if part.zero_point is not None]
        return Grid(scale, torch.cat(points, dim=1) if points else None, parts[0].low, parts[0].high)
    if spec.granularity == "token":
        raise ValueError("granularity: 'token' is for activations: use channel for one scale a row of a weight")
    x, weighing = grouped(weight, spec), None if weighing is None else grouped(weighing, spec)
    if spec.granularity == "tensor":
        x, weighing = x.flatten(), None if weighing is None else weighing.flatten()
    return _fit(x, spec, weighing)


def dynamic_grid(x: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid of an activation (..., channels) from its own values: one a call (tensor), row (token) or group.

    Raises:
        ValueError: for granularity channel (its ranges come from statistics: `static_grid`), or a group size that does
            not divide the channels.
    """
    if spec.granularity in {"channel", "cluster"}:
        raise ValueError(
            f"granularity: {spec.granularity!r} has no dynamic ranges: use token, or static ranges from statistics"
        )
    values = grouped(x, spec)
    return _fit(values.flatten() if spec.granularity == "tensor" else values, spec)


def static_grid(
    minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None = None
) -> Grid:
    """Returns the grid of an activation from per-channel statistics (channels,): one scale for the tensor, one a channel,
    or one a cluster (clusters,) with `labels`, the cluster of each channel, to be spread by `Grid.of_channels`.

    Raises:
        ValueError: for another granularity, or NaN or inf in the statistics.
    """
    if not (torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise ValueError("the static range holds NaN or inf: take the statistics again")
    if spec.granularity == "tensor":
        minimum, maximum = minimum.min().reshape(1), maximum.max().reshape(1)
    elif spec.granularity == "cluster":
        clusters = range(_clusters(labels, len(minimum)))
        minimum = torch.stack([minimum[labels == k].min() for k in clusters])
        maximum = torch.stack([maximum[labels == k].max() for k in clusters])
    elif spec.granularity != "channel":
        raise ValueError(f"granularity: {spec.granularity!r} has no static ranges: use tensor, channel or cluster")
    return _grid(minimum, maximum, spec)


def observed_grid(rows: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None = None) -> Grid:
    """Returns the grid of an activation fitted to tokens that were seen, `rows` (tokens, channels), by percentile or mse.

    One scale for the tensor (1,), one a channel (channels,), or one a cluster of channels (clusters,) with `labels`.
    """
    if spec.granularity == "channel":
        # Together: one channel after another took most of what such a run takes.
        grid = _fit(rows.t().contiguous(), spec)
        return replace(
            grid, scale=grid.scale[:, 0], zero_point=None if grid.zero_point is None else grid.zero_point[:, 0]
        )
    if spec.granularity == "tensor":
        groups = [rows.flatten()]
    elif spec.granularity == "cluster":
        groups = [rows[:, labels == k].flatten() for k in range(_clusters(labels, rows.shape[1]))]
    else:
        raise ValueError(f"granularity: {spec.granularity!r} has no static ranges: use tensor, channel or cluster")
    grids = [_fit(values, spec) for values in groups]
    points = [grid.zero_point for grid in grids if grid.zero_point is not None]
    return Grid(torch.cat([g.scale for g in grids]), torch.cat(points) if points else None, grids[0].low, grids[0].high)


class RunningRange:
    """Running mean of per-channel minima and maxima, one update a sample (the EMA calibration of RPTQ's reference code).

    `minimum` and `maximum` are float32 (channels,); the first sample sets them, each later one weighs 1 - `MOMENTUM`.
    """

    MOMENTUM = 0.9

    def __init__(self) -> None:
        self.minimum: torch.Tensor | None = None
        self.maximum: torch.Tensor | None = None

    def update(self, sample: torch.Tensor) -> None:
        """Adds one sample (tokens, channels)."""
        low, high = sample.amin(0).float(), sample.amax(0).float()
        first = self.minimum is None or self.maximum is None
        self.minimum = low if first else torch.lerp(low, self.minimum, self.MOMENTUM)  # type: ignore[arg-type]
        self.maximum = high if first else torch.lerp(high, self.maximum, self.MOMENTUM)  # type: ignore[arg-type]

    def update_all(self, samples: torch.Tensor) -> None:
        """Adds samples (samples, tokens, channels), one after another."""
        for sample in samples:
            self.update(sample)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (minimum, maximum). Raises `ValueError` before the first sample."""
        if self.minimum is None or self.maximum is None:
            raise ValueError("the running range has seen no sample")
        return self.minimum, self.maximum


def _clusters(labels: torch.Tensor | None, channels: int) -> int:
    """Returns the number of clusters; ValueError when `labels` do not number the channels 0 .. clusters - 1 without a gap."""
    if labels is None:
        raise ValueError("granularity: 'cluster' needs labels: which cluster each channel is in")
    counts = torch.bincount(labels)
    if len(labels) != channels or not bool(counts.all()):
        raise ValueError(f"labels: {len(labels)} labels in {len(counts)} clusters, some empty, for {channels} channels")
    return len(counts)


def _grid(minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec) -> Grid:
    """Returns the grid that spans the range, or what `spec` keeps of it, as `spec` stores it."""
    if spec.clip != 1:
        minimum, maximum = minimum.float() * spec.clip, maximum.float() * spec.clip
    grid = grid_from_range(minimum, maximum, spec.bits, spec.symmetric, spec.full_range)
    return rounded_scales(grid, minimum, spec.scales)


def _fit(x: torch.Tensor, spec: QuantSpec, importance: torch.Tensor | None = None) -> Grid:
    if spec.range == "percentile":
        minimum, maximum = _percentiles(x, spec.percentile)
        return _grid(minimum, maximum, spec)
    # amin and amax in turn: torch.aminmax along a dimension is many times slower on CPU.
    minimum, maximum = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if spec.range == "mse":
        return _least_error(x, minimum, maximum, spec, importance)
    return _grid(minimum, maximum, spec)


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


def _least_error(
    x: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec, importance: torch.Tensor | None
) -> Grid:
    """Returns, for each scale of its own, the shrunk range with the least squared error, weighed by `importance` (the shape
    of x); ties keep the wider range.
    """
    shape, size = minimum.shape, x.shape[-1]
    minimum, maximum = minimum.float().reshape(-1, 1), maximum.float().reshape(-1, 1)
    parts, start = [], 0
    for rows in _row_chunks(x.reshape(-1, size)):
        end = start + len(rows)
        weighing = None if importance is None else importance.reshape(-1, size)[start:end]
        parts.append(_best_shrink(rows, minimum[start:end], maximum[start:end], spec, weighing))
        start = end
    shrink = torch.cat(parts)
    return _grid((minimum * shrink).view(shape), (maximum * shrink).view(shape), spec)


def _best_shrink(
    x: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec, importance: torch.Tensor | None
) -> torch.Tensor:
    """Returns the best multiplier (rows, 1) of the range (rows, 1) of each row of `x`."""
    best = torch.full_like(minimum, torch.inf)
    chosen = torch.ones_like(best)
    extent = torch.maximum(minimum.abs(), maximum.abs())
    extent = torch.where(extent == 0, torch.ones_like(extent), extent)
    size = _chunk(x)
    for step in range(SHRINKS):
        shrink = 1 - step / 100
        grid = _grid(minimum * shrink, maximum * shrink, spec)
        error = torch.zeros_like(best)
        # One row may be a whole tensor: its error is summed piece by piece.
        for i, part in enumerate(x.split(size, dim=-1)):
            squares = _missed(part.float() / grid.scale, grid).square_()
            if importance is not None:
                squares *= importance[:, i * size : (i + 1) * size]
            error += squares.sum(-1, keepdim=True)
        # Relative to the range, so that huge values do not overflow when squared.
        error *= (grid.scale / extent).square_()
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, torch.full_like(chosen, shrink), chosen)
    return chosen


def _missed(quotients: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns by how much values over their scale, (rows, n), miss the nearest code of the grid."""
    codes = quotients.round()
    if grid.zero_point is None:
        codes.clamp_(grid.low, grid.high)
    else:
        # Two passes with a number a row are fewer than to the zero point, between the ends, and back.
        torch.maximum(codes, grid.low - grid.zero_point, out=codes)
        torch.minimum(codes, grid.high - grid.zero_point, out=codes)
    return codes.sub_(quotients)


def _chunk(x: torch.Tensor) -> int:
    return CPU_CHUNK if x.device.type == "cpu" else CHUNK


def _row_chunks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits (rows, n) into pieces of whole rows that hold as many values as are looked at together."""
    return rows.split(max(1, _chunk(rows) // max(1, rows.shape[-1])))
