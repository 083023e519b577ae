"""GPTQ (Frantar et al. 2022): rounds a weight column by column; the columns not yet rounded make up for each error.

The layer loss is tr(D H D^T) with D = W - Q and H = 2 X^T X / n. The update of GPTQ's equations 2 to 4, written with
V = U / diag(U) (rows divided), U = chol(H^-1) upper: column j is rounded with error e_j, and every later column c moves
by -e_j V_jc.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from quantize.checks import all_finite
from quantize.codecs.base import Encoded
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, dequantize, grouped, quantize
from quantize.grid.labelled_grid import LabelledGrid, column_labels, error_importance, fitted_grid, labelled
from quantize.grid.ranges import weight_grid
from quantize.kernels.matmul import add_gram, mirrored, row_squares
from quantize.solvers.clip import clipped_grid, clipped_levels
from quantize.solvers.descent import descend
from quantize.solvers.factorisation import Factor, Failure, factorise
from quantize.solvers.feedback import round_with_feedback
from quantize.solvers.levels import IntegerLevels, Levels
from quantize.solvers.tiles.block_feedback import code_with_feedback, factorise_blocks, has_tiles
from quantize.spec.quant_spec import QuantSpec

SCALES = ("range", "diagonal", "pivots", "block")
"""How scales are fitted before the rounding: see `GptqOptions`."""


@dataclass(frozen=True)
class GptqOptions:
    """Options of GPTQ.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean; above 0, at most 1.
        block: columns after which the errors are carried to all later columns; changes the time, not the result.
        act_order: round the columns in descending order of the Hessian's diagonal; otherwise from left to right.
        static_groups: fit all grids to the original weight; otherwise a group's (or cluster's) grid is fitted when its
            first column is reached, to weights that carry every error made so far. Formats that are no integer grid
            have their scales fitted first.
        scales: how they are fitted: ``range``, as the spec says; or by a search of ranges for the least error of rounding
            to nearest, weighed by the Hessian's ``diagonal``; by its ``pivots`` (what an error costs after all later columns
            made up for it: the diagonal of the factor); or by the ``block`` of the Hessian that belongs to the columns of one
            scale (arXiv 2602.02126, its first stage). Any but range needs static groups.
        descent: sweeps of coordinate descent on scales and codes after the rounding, 0 or more; on the damped Hessian, since
            on SmolLM2's Linears that left less error on other text than descent on the Hessian itself.

    Raises:
        ValueError: for a value outside its range, or scales that would be fitted anew on the way.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    scales: str = "range"
    descent: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            close = 1 if self.damping > 1 else 0.01
            raise ValueError(f"damping: {self.damping!r} is not valid: expected a number above 0, up to 1: use {close}")
        if self.block < 1:
            raise ValueError(f"block: {self.block!r} is not valid: expected 1 or more columns: use 1, or the usual 128")
        if self.scales not in SCALES:
            raise ValueError(f"scales: {self.scales!r} is not valid: expected one of {', '.join(SCALES)}: use range")
        if self.scales != "range" and not self.static_groups:
            raise ValueError(f"scales: {self.scales!r} are fitted first: use static_groups true, or scales range")
        if self.descent < 0:
            raise ValueError(f"descent: {self.descent!r} is not valid: expected 0 or more sweeps: use 0")

    def check_tiles(self, spec: QuantSpec) -> None:
        """Raises `ValueError`, naming the option, for what a format of tiles has no levels for."""
        for name, usual in (("scales", "range"), ("descent", 0)):
            if getattr(self, name) != usual:
                value = getattr(self, name)
                raise ValueError(f"{name}: {value!r} needs levels, and format {spec.format!r} has none: use {usual}")


class Hessian:
    """Accumulates H = 2 X^T X / n over the n tokens that a Linear reads, in float32.

    The same for any split of the tokens into updates, to rounding.

    Args:
        channels: input channels of the Linear.
        device: where the inputs are.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._sum = torch.zeros(channels, channels, device=device)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Adds the tokens of `x` (..., channels). A 16-bit `x` is converted to float32 here, a float32 one is not copied whole.

        Raises:
            ValueError: for another number of channels.
        """
        channels = len(self._sum)
        if x.shape[-1] != channels:
            raise ValueError(f"x: {x.shape[-1]} channels, expected {channels}")
        tokens = x.detach().reshape(-1, channels)
        add_gram(self._sum, tokens)
        self.count += len(tokens)

    def merge(self, other: "Hessian") -> None:
        """Adds the tokens that `other` has seen, in place."""
        self._sum += other._sum
        self.count += other.count

    def with_tokens_of(self, other: "Hessian") -> "Hessian":
        """Returns the Hessian of the tokens of both."""
        both = Hessian(0)
        both._sum, both.count = self._sum + other._sum, self.count + other.count
        return both

    def clear(self) -> None:
        """Forgets all tokens, and keeps the memory."""
        self._sum.zero_()
        self.count = 0

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what has been accumulated, by name: another process's `from_state` goes on with it."""
        return {"sum": self._sum, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "Hessian":
        """Returns the Hessian whose `state` this is."""
        made = cls(0)
        made._sum, made.count = state["sum"], int(state["count"])
        return made

    @property
    def matrix(self) -> torch.Tensor:
        """H, float32 (channels, channels); zeros before the first token."""
        return mirrored(self._sum).mul_(2 / max(self.count, 1))


@dataclass(frozen=True)
class Solution:
    """What GPTQ chose for one weight (out, in).

    Attributes:
        codes: (out, in) in the weight's own column order: int8 for a symmetric grid, uint8 otherwise.
        grid: scale and zero point as `quantize.grid.ranges.weight_grid` shapes them: (1,) for granularity tensor, (out, 1)
            for channel, (out, groups, 1) for group, (out, clusters) for cluster.
        damping: share of the diagonal's mean that was added; above the option's value when Cholesky failed there.
        failures: how many times Cholesky failed, each time with a tenth of the next damping.
        fallback: whether the weight was rounded to nearest, since there is nothing to go by (an all-zero Hessian) or no
            damping made Cholesky succeed.
        loss: tr(D H D^T) / (2 out): the mean squared error of the layer's output over tokens and outputs.
        rtn_loss: the same for rounding to nearest on grids fitted to the original weight.
        rtn_rows: rows that were left rounded to nearest, because that is the better of the two for them.
    """

    codes: torch.Tensor
    grid: Grid
    damping: float
    failures: int
    fallback: bool
    loss: float
    rtn_loss: float
    rtn_rows: int


@dataclass(frozen=True)
class FormatSolution:
    """What GPTQ chose for one weight (out, in) in a format that is no integer grid, or is one.

    Attributes:
        stored: what the format's codec stores; ``codec.decode(stored, spec, shape)`` gives the weight that `loss` is of.
        damping: as in `Solution`; so are `failures`, `fallback`, `loss`, `rtn_loss` and `rtn_rows`.
    """

    stored: Encoded
    damping: float
    failures: int
    fallback: bool
    loss: float
    rtn_loss: float
    rtn_rows: int


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: QuantSpec,
    options: GptqOptions,
    labels: torch.Tensor | None = None,
    factor: Factor | Failure | None = None,
) -> Solution:
    """Quantizes a weight so that the loss under `hessian` is small, and for no row above that of rounding to nearest.

    Columns that no token used (H_jj = 0) become 0, unless that is every column. Computed in float32 on the weight's device.

    Args:
        weight: (out, in), any floating type.
        hessian: (in, in), symmetric; its scale does not change the codes.
        spec: format of the weight: its granularity, and the range estimator that fits the grids.
        options: of the solver.
        labels: cluster of each input channel, int64 (in,), numbered from 0 without a gap; with granularity cluster.
        factor: what `factorise` made of this Hessian with these options; None where it has not been called.

    Raises:
        ValueError: for NaN or inf in the weight or the Hessian, shapes that do not fit, labels missing or with gaps, or a
            format that is no integer grid (`solve_format`).
    """
    if not spec.affine:
        raise ValueError(f"format: {spec.format!r} is no integer grid: use solve_format")
    problem = _problem(weight, hessian, spec, labels)
    importance = error_importance(problem.hessian)
    nearest = fitted_grid(problem.weight, spec, problem.labels, importance)
    rtn_codes = quantize(problem.weight, nearest.spread(problem.labels))
    rtn_loss = problem.row_losses(dequantize(rtn_codes, nearest.spread(problem.labels)))
    factor = factor or factorise(problem.hessian, options.damping, options.act_order)
    if isinstance(factor, Failure):
        mean = float(rtn_loss.mean())
        plain = nearest.shaped(spec)
        return Solution(rtn_codes, plain, factor.damping, factor.failures, True, mean, mean, len(problem.weight))
    weighing = _weighing(problem, factor, options)
    grid = nearest if weighing is None else _searched(problem, weighing)
    levels = IntegerLevels(grid, len(problem.weight), spec.scales)
    refit = _Refit(problem, levels, factor.order, importance) if _refits(options, levels) else None
    steps = _rounded(problem, levels, factor, options, refit)
    grid = levels.grid()
    codes = _codes(steps, grid, problem.labels)
    loss = problem.row_losses(dequantize(codes, grid.spread(problem.labels)))
    worse = _worse(loss, rtn_loss, levels.shared)
    if worse.any():
        codes = torch.where(worse[:, None], rtn_codes, codes)
        grid, loss = grid.with_rows(worse, nearest), torch.where(worse, rtn_loss, loss)
    means = float(loss.mean()), float(rtn_loss.mean())
    return Solution(codes, grid.shaped(spec), factor.damping, factor.failures, False, *means, int(worse.sum()))


@torch.no_grad()
def solve_format(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: QuantSpec,
    options: GptqOptions,
    factor: Factor | Failure | None = None,
) -> FormatSolution:
    """Quantizes a weight to a format of levels and scales (NF4, FP4, MXFP4, MXFP8, NVFP4, FP8), as `solve` does to integers.

    Scales are fitted to the weight first, by `options.scales`, among those that the format can store; ``range`` is the
    format's own rule. No row's loss is above that of rounding to nearest; where rows cannot be told apart (one scale for
    all, double quantization, tiles) the whole weight's is not. A format of tiles (trellis) carries errors from one column of
    tiles to the next, whatever `options.block`, and a `factor` of single columns is not used.

    Raises:
        ValueError: as `solve`, or for a format that has no levels and scales alone; for options that need levels, of tiles.
    """
    if spec.affine:
        raise ValueError(f"format: {spec.format!r} is an integer grid: use solve")
    problem, codec, tiled = _problem(weight, hessian, spec, None), codec_of(spec), has_tiles(spec)
    if tiled:
        options.check_tiles(spec)
        factor = factorise_blocks(problem.hessian, options.damping, options.act_order)
    shape = problem.weight.shape
    nearest = codec.encode(problem.weight, spec)
    rtn_loss = problem.row_losses(codec.decode(nearest, spec, shape))
    factor = factor or factorise(problem.hessian, options.damping, options.act_order)
    if isinstance(factor, Failure):
        mean = float(rtn_loss.mean())
        return FormatSolution(nearest, factor.damping, factor.failures, True, mean, mean, len(problem.weight))
    if tiled:
        stored, together = code_with_feedback(problem.wanted, problem.hessian, factor, spec), True
    else:
        levels = clipped_levels(problem.weight, spec, _weighing(problem, factor, options))
        stored, together = levels.encoded(_rounded(problem, levels, factor, options, None).t()), levels.shared
    loss = problem.row_losses(codec.decode(stored, spec, shape))
    worse = _worse(loss, rtn_loss, together or spec.double_quant)
    if worse.any():
        stored = {name: _with_rows(part, worse, nearest[name]) for name, part in stored.items()}
        loss = torch.where(worse, rtn_loss, loss)
    means = float(loss.mean()), float(rtn_loss.mean())
    return FormatSolution(stored, factor.damping, factor.failures, False, *means, int(worse.sum()))


@torch.no_grad()
def quantized_weights(
    weight: torch.Tensor, hessian: torch.Tensor, specs: Mapping[str, QuantSpec], options: GptqOptions
) -> dict[str, torch.Tensor]:
    """Returns a weight (out, in) as GPTQ quantizes it to each of several formats, float32: the Hessian is factorised once.

    Args:
        weight: as for `solve`, and so are `hessian` and `options`.
        specs: formats by a name; none with granularity cluster.

    Raises:
        ValueError: as `solve`.
    """
    factor = factorise(hessian.to(weight.device).float(), options.damping, options.act_order)
    found = {}
    for name, spec in specs.items():
        if spec.affine:
            solution = solve(weight, hessian, spec, options, factor=factor)
            found[name] = dequantize(grouped(solution.codes, spec), solution.grid).reshape(weight.shape)
        else:
            stored = solve_format(weight, hessian, spec, options, factor).stored
            found[name] = codec_of(spec).decode(stored, spec, weight.shape).float()
    return found


@dataclass(frozen=True)
class _Problem:
    """A weight (out, in), its Hessian, the label of each column."""

    weight: torch.Tensor
    hessian: torch.Tensor
    spec: QuantSpec
    labels: torch.Tensor

    @property
    def wanted(self) -> torch.Tensor:
        """The weight with 0 in the columns that no token used."""
        return torch.where(self.hessian.diagonal() == 0, torch.zeros_like(self.weight), self.weight)

    def row_losses(self, quantized: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared output error over tokens of each row, (out,)."""
        return row_squares(self.weight - quantized, self.hessian).div_(2).clamp_(min=0)


def _problem(weight: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None) -> _Problem:
    weight, hessian = weight.detach().float(), hessian.to(weight.device).float()
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"hessian: shape {tuple(hessian.shape)} does not fit a weight {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not all_finite(tensor):
            raise ValueError(f"{name}: holds NaN or inf")
    return _Problem(weight, hessian, spec, column_labels(weight, spec, labels))


def _weighing(problem: _Problem, factor: Factor, options: GptqOptions) -> torch.Tensor | None:
    """Returns what errors weigh where scales are searched: (in,) or (in, in); None where they are not."""
    if options.scales == "range":
        return None
    if options.scales == "diagonal":
        return problem.hessian.diagonal()
    if options.scales == "block":
        return problem.hessian
    return torch.empty_like(factor.pivots).scatter_(0, factor.order, factor.pivots)


def _searched(problem: _Problem, weighing: torch.Tensor) -> LabelledGrid:
    spec = problem.spec
    clusters = problem.labels if spec.granularity == "cluster" else None
    return labelled(clipped_grid(problem.weight, spec, weighing, clusters), spec, len(problem.weight))


def _rounded(
    problem: _Problem, levels: Levels, factor: Factor, options: GptqOptions, refit: "_Refit | None"
) -> torch.Tensor:
    """Returns the levels (in, out) in the weight's own order of columns; `levels` have the scales that go with them."""
    wanted, order = problem.wanted, factor.order
    labels = problem.labels[order].tolist()
    found = round_with_feedback(wanted.t()[order], factor.triangle, labels, levels, options.block, refit)
    steps = torch.empty_like(found)
    steps[order] = found
    if options.descent:
        damped = factor.damped(problem.hessian)
        steps = descend(wanted, damped, steps, levels, problem.labels, options.descent, options.block)
    return steps


def _codes(steps: torch.Tensor, grid: LabelledGrid, labels: torch.Tensor) -> torch.Tensor:
    """Returns the codes (out, in) of whole numbers of steps (in, out)."""
    codes = steps.t() if grid.zero_point is None else steps.t() + grid.zero_point[:, labels]
    return codes.to(torch.int8 if grid.low < 0 else torch.uint8).contiguous()


def _worse(loss: torch.Tensor, rtn_loss: torch.Tensor, together: bool) -> torch.Tensor:
    """Returns the rows (out,) in which rounding to nearest is better; all or none when they stand or fall `together`."""
    return (loss.sum() > rtn_loss.sum()).expand_as(loss) if together else loss > rtn_loss


def _with_rows(part: torch.Tensor, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns a stored tensor with those rows of `other`, a mask (out,); all of it where it has no rows."""
    if part.ndim < 2 or len(part) != len(rows):
        return other if bool(rows.all()) else part
    # As bytes: 8-bit floats cannot be chosen from.
    raw, theirs = (t.contiguous().view(torch.uint8) for t in (part, other))
    return torch.where(rows[:, None], theirs, raw).view(part.dtype)


def _refits(options: GptqOptions, levels: Levels) -> bool:
    return not options.static_groups and len(levels.scale) > 1


class _Refit:
    """Fits the grid of a label anew when its first column is reached."""

    def __init__(self, problem: _Problem, levels: IntegerLevels, order: torch.Tensor, importance: torch.Tensor):
        self._levels, self._labels, self._importance = levels, problem.labels[order], importance[order]
        self._spec = replace(problem.spec, granularity="channel", group_size=None)
        self._of = self._labels.tolist()
        self._fitted: set[int] = set()

    def __call__(self, j: int, start: int, columns: torch.Tensor, gather: torch.Tensor, errors: torch.Tensor) -> None:
        """Sees column `j`; `columns` carry the errors of all blocks before the one from `start`."""
        label = self._of[j]
        if label in self._fitted:
            return
        self._fitted.add(label)
        members = (self._labels == label).nonzero().squeeze(1)
        values = torch.addmm(columns[members], gather[members, start:j], errors[: j - start], alpha=-1).t()
        grid = weight_grid(values, self._spec, None, self._importance[members])
        self._levels.set_scale(label, grid.scale[:, 0])
        if grid.zero_point is not None:
            self._levels.set_zero(label, grid.zero_point[:, 0])
