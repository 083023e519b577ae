"""Search of ranges by what an error of rounding to nearest weighs: clipping of weights, and of a Linear's input.

Every search tries the plain range first and keeps it unless another is strictly better: its own measure is never worse.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quantize.codecs.base import Encoded
from quantize.codecs.k_quants.codec import KQuant
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, fake_quantize, grid_from_range, grouped, quantize
from quantize.grid.ranges import weight_grid
from quantize.grid.scales import rounded_scales
from quantize.kernels.matmul import product, row_squares
from quantize.search import cheapest
from quantize.solvers.levels import FormatLevels, KLevels, absmax_scale, level_form
from quantize.spec.quant_spec import QuantSpec

SHRINKS = tuple(round(1 - 0.02 * i, 2) for i in range(41))
"""Multipliers of a range: 1 to 0.2. At 2 bits the best range of normal weights is about half of the greatest."""
INPUT_RATIOS = tuple(round(1 - 0.05 * i, 2) for i in range(11))
"""Multipliers of a token's range: 1 to 0.5."""


@torch.no_grad()
def clipped_grid(
    weight: torch.Tensor,
    spec: QuantSpec,
    weighing: torch.Tensor,
    labels: torch.Tensor | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> Grid:
    """Returns the grid of the shrunk ranges with the least weighed error of rounding to nearest, shaped as `weight_grid`'s.

    For each scale of its own: both ends are shrunk together; then, for a grid with zero points, each end alone. The columns
    of other scales are taken as exact, so that with one scale a row and a whole Hessian the measure is the layer's loss.

    Args:
        weight: (out, in).
        spec: an integer format, whose range estimator is minmax here.
        weighing: (in,): what a squared error in each column weighs, 0 or more (the Hessian's diagonal); or (in, in): the
            Hessian, symmetric, of which the blocks of the columns of one scale are used.
        labels: cluster of each column, with granularity cluster.
        shrinks: multipliers of the range to try.

    Raises:
        ValueError: for a weighing that does not fit the weight, or as `weight_grid`.
    """
    weight = weight.float()
    _check(weight, weighing)
    plain = weight_grid(weight, _minmax(spec), labels)
    batches = _batches(weight, spec, labels, weighing)
    grids = [_searched(values, weigh, spec, shrinks) for values, weigh in batches]
    scale = torch.cat([g.scale for g in grids], dim=1)
    points = [g.zero_point for g in grids if g.zero_point is not None]
    zero_point = torch.cat(points, dim=1).reshape(plain.scale.shape) if points else None
    return Grid(scale.reshape(plain.scale.shape), zero_point, plain.low, plain.high)


@torch.no_grad()
def clipped_levels(weight: torch.Tensor, spec: QuantSpec, weighing: torch.Tensor | None) -> FormatLevels | KLevels:
    """Returns the scales of a format that is no integer grid, with the least weighed error of rounding to nearest.

    Args:
        weight: float32 (out, in).
        spec: the format.
        weighing: as in `clipped_grid`; None keeps the format's own scales, of the greatest magnitude.

    Raises:
        ValueError: for a format that has no levels and scales alone, or a weighing that does not fit the weight.
    """
    codec = codec_of(spec)
    if isinstance(codec, KQuant):
        return KLevels(weight, codec, weighing)
    form = level_form(spec, weight.abs().amax())
    plain = absmax_scale(weight, spec, form)
    if weighing is None:
        return FormatLevels(spec, form, plain, len(weight))
    _check(weight, weighing)
    (values, weigh), *_ = _batches(weight, spec, None, weighing)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        stored = form.scales(form.stored_scales(scale)) if not spec.double_quant else scale
        spread = stored.reshape(-1, values.shape[1], 1)
        divisor = torch.where(spread < torch.finfo(torch.float32).tiny, torch.full_like(spread, torch.inf), spread)
        found = weigh(form.nearest(values / divisor) * spread - values)
        return found.sum().reshape(1) if plain.numel() == 1 else found.reshape(plain.shape)

    return FormatLevels(spec, form, _least(plain, errors, form.multipliers), len(weight))


@torch.no_grad()
def nearest_clipped(
    weight: torch.Tensor, spec: QuantSpec, weighing: torch.Tensor, labels: torch.Tensor | None
) -> tuple[torch.Tensor, Grid] | Encoded:
    """Returns what is stored of a weight (out, in) rounded to nearest on the ranges that lose least under `weighing`.

    Codes (out, in) and their grid, or what the codec of another format stores. Arguments and errors are those of
    `clipped_grid`.
    """
    if spec.affine:
        grid = clipped_grid(weight, spec, weighing, labels)
        spread = grid if labels is None else grid.of_channels(labels)
        return quantize(grouped(weight, spec), spread).reshape(weight.shape), grid
    wide = weight.float()
    levels = clipped_levels(wide, spec, weighing)
    size = wide.shape[1] // len(levels.scale)
    steps = torch.empty_like(wide.t(), memory_format=torch.contiguous_format)
    for j, column in enumerate(wide.t()):
        levels.round(j // size, column, steps[j])
    return levels.encoded(steps.t())


@torch.no_grad()
def input_clip_ratio(
    weights: Sequence[torch.Tensor],
    x: torch.Tensor,
    fake: Callable[[torch.Tensor, float], torch.Tensor],
    ratios: Sequence[float] = INPUT_RATIOS,
    dearer: float = math.inf,
) -> tuple[float, list[float]]:
    """Returns the clip ratio of the ranges of a tensor that gives the Linears that read it the least output error.

    The error is the sum of squares of X W^T - X' W^T over all tokens and rows, from the moments of X - X': one product a ratio.

    Args:
        weights: of all Linears that read the input, each (out, in).
        x: tokens of the input, (tokens, in).
        fake: gives the input rounded with its ranges multiplied by a ratio, such as by `QuantSpec.clip`.
        ratios: to try; the first is kept unless another is strictly better.
        dearer: where an error is so many times the least so far, ratios behind it are not tried: the error falls, then rises, as
            ratios that descend clip more.

    Returns:
        The ratio, and the error of every ratio that was tried relative to the output's energy.
    """
    x = x.reshape(-1, x.shape[-1]).float()
    gram = sum(product(w.float().t(), w.float()) for w in weights)
    if not isinstance(gram, torch.Tensor):
        raise ValueError("weights: expected one Linear's weight or more")
    energy = _energy(x, gram).clamp_min(torch.finfo(torch.float32).tiny)
    return cheapest(ratios, lambda ratio: float(_energy(fake(x, ratio) - x, gram) / energy), dearer)


Weigh = Callable[[torch.Tensor], torch.Tensor]
"""Gives the weighed error (rows, groups) of differences (rows, groups, size)."""


def _check(weight: torch.Tensor, weighing: torch.Tensor) -> None:
    size = weight.shape[1]
    if tuple(weighing.shape) not in {(size,), (size, size)}:
        raise ValueError(f"weighing: shape {tuple(weighing.shape)} is not ({size},) or ({size}, {size})")


def _minmax(spec: QuantSpec) -> QuantSpec:
    return replace(spec, range="minmax")


def _batches(
    weight: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None, weighing: torch.Tensor
) -> list[tuple[torch.Tensor, Weigh]]:
    """Returns the values that share scales, (rows, groups, size), and what their errors weigh: one batch for the groups of a
    row, one a cluster.
    """
    # Relative, so that large Hessians do not overflow.
    most = weighing.diagonal().amax() if weighing.ndim == 2 else weighing.amax()
    weighing = weighing.float() / most.float().clamp_min(torch.finfo(torch.float32).tiny)
    size = weight.shape[1]
    if spec.granularity == "cluster" and labels is not None:
        members = [(labels == k).nonzero().squeeze(1) for k in range(int(labels.max()) + 1)]
        return [
            (weight[:, m].unsqueeze(1), _weigh([weighing[m] if weighing.ndim == 1 else weighing[m][:, m]]))
            for m in members
        ]
    group = spec.group_size if spec.granularity == "group" and spec.group_size is not None else size
    starts = range(0, size, group)
    parts = [weighing[i : i + group] if weighing.ndim == 1 else weighing[i : i + group, i : i + group] for i in starts]
    return [(weight.unflatten(1, (len(parts), group)), _weigh(parts))]


def _weigh(parts: list[torch.Tensor]) -> Weigh:
    """Returns the measure of groups with these weighings, each (size,) or (size, size)."""
    if parts[0].ndim == 1:
        each = torch.stack(parts)
        return lambda difference: (difference.square() * each).sum(-1)
    return lambda difference: torch.stack(
        [(product(difference[:, g], part) * difference[:, g]).sum(-1) for g, part in enumerate(parts)], dim=1
    ).clamp_(min=0)


def _searched(values: torch.Tensor, weigh: Weigh, spec: QuantSpec, shrinks: Sequence[float]) -> Grid:
    """Returns the grid (rows, groups), or (1, 1) with granularity tensor, of the best shrunk ranges."""
    low, high = values.amin(-1), values.amax(-1)
    shared = spec.granularity == "tensor"
    if shared:
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    low, high = low.clamp(max=0), high.clamp(min=0)

    def grid_of(low: torch.Tensor, high: torch.Tensor) -> Grid:
        return rounded_scales(grid_from_range(low, high, spec.bits, spec.symmetric), low, spec.scales)

    def errors(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        grid = grid_of(low, high)
        point = None if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
        found = weigh(fake_quantize(values, Grid(grid.scale.unsqueeze(-1), point, grid.low, grid.high)) - values)
        return found.sum().reshape(1, 1) if shared else found

    shrink = _least(torch.ones_like(low), lambda s: errors(low * s, high * s), shrinks)
    low, high = low * shrink, high * shrink
    if not spec.symmetric:
        low = _least(low, lambda end: errors(end, high), shrinks)
        high = _least(high, lambda end: errors(low, end), shrinks)
    return grid_of(low, high)


def _least(
    plain: torch.Tensor, errors: Callable[[torch.Tensor], torch.Tensor], multipliers: Sequence[float]
) -> torch.Tensor:
    """Returns, element by element, the product of `plain` and the multiplier with the least error; `plain` itself on ties."""
    chosen, best = plain, errors(plain)
    for multiplier in multipliers:
        tried = plain * multiplier
        found = errors(tried)
        better = found < best
        best = torch.where(better, found, best)
        chosen = torch.where(better, tried, chosen)
    return chosen


def _energy(x: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return row_squares(x, gram).sum()
