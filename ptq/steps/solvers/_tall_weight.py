"""Linears that read one tensor, solved by GPTQ as one tall weight, and its rows in pieces that ranks share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptq.errors import UserError
from ptq.network.network import weight_of
from ptq.steps._solving import Solved, labels_of, specs_of
from ptq.steps._step import Context
from ptq.steps.solvers._target_moments import INPUT, Moments
from quantize.codecs.base import Encoded, checked
from quantize.codecs.registry import codec_of
from quantize.grid.affine import dequantize, grouped
from quantize.kernels.matmul import product
from quantize.solvers.correction import corrected_weight, damped_factor, held_out_strength, told_by_input
from quantize.solvers.damping import held_out_damping
from quantize.solvers.factorisation import factorise
from quantize.solvers.gptq import FormatSolution, GptqOptions, Solution, solve, solve_format
from quantize.solvers.tiles.block_feedback import has_tiles
from quantize.spec.quant_spec import QuantSpec

STACKED = ("channel", "group")
"""Granularities whose grids belong to one row."""
PIECES = {4: 4096, 2: 768}
"""Into how many pieces a weight is cut on a CPU where it has so many rows at least: with few rows the columns' loop is most of the time."""


@dataclass(frozen=True)
class Piece:
    """Rows of a tall weight.

    Attributes:
        moments: number of the moments of what it reads.
        names: full names of its Linears, one below another.
        spec: their format.
        rows: of all these Linears together.
        columns: channels of what they read.
    """

    moments: int
    names: tuple[str, ...]
    spec: QuantSpec
    rows: slice
    columns: int

    @property
    def cost(self) -> float:
        """Of solving for it, in no unit, the factorisations aside."""
        return float(self.rows.stop - self.rows.start) * self.columns**2


def pieces_of(context: Context, number: int, names: Sequence[str]) -> list[Piece]:
    """Returns the pieces of the Linears `names`, which share the moments of that number.

    Rows do not see one another, so the Linears whose rows have grids of their own are one tall weight: one factorisation serves all,
    and on a CPU some rows are solved apart, whoever solves them. On a GPU a loop over the columns takes as long for few rows.
    """
    together: dict[tuple[QuantSpec, str], list[str]] = {}
    found = []
    for name in names:
        spec = specs_of(context, name).weight
        if spec is not None:
            stacked = _stacked(spec, len(weight_of(context.module(name))))
            together.setdefault((spec, "" if stacked else name), []).append(name)
    for (spec, alone), linears in together.items():
        weights = [weight_of(context.module(name)) for name in linears]
        rows, columns = sum(len(w) for w in weights), weights[0].shape[1]
        apart = not alone and spec.affine and weights[0].device.type == "cpu"
        counts = (count for count, least in PIECES.items() if apart and rows >= least and rows % count == 0)
        size = rows // next(counts, 1)
        cuts = (slice(start, start + size) for start in range(0, rows, size))
        found += [Piece(number, tuple(linears), spec, cut, columns) for cut in cuts]
    return found


class TallWeight:
    """Solves pieces of one tall weight: what its Hessian is factorised for serves all of them.

    Args:
        context: of the step.
        options: the step's.
        solving: GPTQ's.
        pieces: those that are to be solved here.
        moments: of what the Linears read.
    """

    def __init__(self, context: Context, options: Any, solving: GptqOptions, pieces: Sequence[Piece], moments: Moments):
        self.names, self.spec = pieces[0].names, pieces[0].spec
        self.notes: list[str] = []
        self._context, self._options, self._moments = context, options, moments
        self._solving = solving
        self._hessian = moments.whole.hessian.matrix
        self._labels = labels_of(context, self.names[0], self.spec, "weight")
        weight = torch.cat([_weight(context, name).float() for name in self.names])
        try:
            corrected = self._corrected(weight)
            self._weights = {piece.rows.start: corrected(piece.rows) for piece in pieces}
            if options.search_damping and all(part.hessian.count for part in moments.parts):
                self._solving = self._damped(corrected(slice(0, len(weight))))
            # A format of tiles has a factor of its own.
            tiled = has_tiles(self.spec)
            self._factor = None if tiled else factorise(self._hessian, self._solving.damping, solving.act_order)
        except ValueError as error:
            raise UserError(f"{', '.join(self.names)}: {error}") from None

    def solved(self, piece: Piece) -> Solved:
        """Returns what was chosen for the piece's rows."""
        weight = self._weights.pop(piece.rows.start)
        try:
            if not self.spec.affine:
                of_format = solve_format(weight, self._hessian, self.spec, self._solving, self._factor)
                self._note(of_format)
                return of_format.stored
            solution = solve(weight, self._hessian, self.spec, self._solving, self._labels, self._factor)
        except ValueError as error:
            raise UserError(f"{', '.join(self.names)}: {error}") from None
        self._note(solution)
        return solution.codes, solution.grid

    def _corrected(self, weight: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """Returns what gives rows of the weight that GPTQ is to round: the weight's own, or those that take errors before it back."""
        whole = self._moments.whole
        strength = self._strength(weight)
        if strength is None:
            return weight.__getitem__
        factor = damped_factor(self._hessian, strength)
        if factor is not None and whole.error is not None and whole.of == INPUT and len(weight) > weight.shape[1]:
            told = told_by_input(whole.error.matrix, factor)
            return lambda rows: weight[rows] + product(weight[rows], told)

        def of(rows: slice) -> torch.Tensor:
            return corrected_weight(weight[rows], whole.of_outputs(weight, rows), self._hessian, strength, factor)

        return of

    def _strength(self, weight: torch.Tensor) -> float | None:
        """Returns the damping of the correction of a weight, or None for none."""
        parts = self._moments.parts
        if parts[0].error is None:
            return None
        if len(parts) == 1 or not all(part.hessian.count for part in parts):
            return self._solving.damping
        fit, held = ((part.of_outputs(weight), part.hessian.matrix) for part in parts)
        found = held_out_strength(fit, held)
        if found is None:
            self.notes.append(f"gptq: {', '.join(self.names)}: held out samples say that no correction is best")
        return found

    def _damped(self, weight: torch.Tensor) -> GptqOptions:
        """Returns the options with the damping that loses least on the held out samples."""
        fit, held = (part.hessian.matrix for part in self._moments.parts)
        spec, labels = self.spec, self._labels

        def values(options: GptqOptions) -> torch.Tensor:
            if not spec.affine:
                stored = solve_format(weight, fit, spec, options).stored
                return codec_of(spec).decode(stored, spec, weight.shape)
            found = solve(weight, fit, spec, options, labels)
            spread = found.grid if labels is None else found.grid.of_channels(labels)
            return dequantize(grouped(found.codes, spec), spread).reshape(weight.shape)

        chosen = held_out_damping(weight, held, values, self._solving)
        if chosen.damping != self._solving.damping:
            self.notes.append(f"gptq: {', '.join(self.names)}: damping {chosen.damping:g} by held out samples")
        return replace(self._solving, damping=chosen.damping)

    def _note(self, solution: Solution | FormatSolution) -> None:
        """Says where a Hessian could not be factorised as it was."""
        for name in self.names:
            if solution.fallback:
                why = (
                    f"its Hessian could not be factorised in {solution.failures} tries"
                    if solution.failures
                    else "no token reached it"
                )
                self.notes.append(f"gptq: {name}: {why}: rounded to nearest instead")
            elif solution.damping > self._solving.damping:
                self.notes.append(
                    f"gptq: {name}: damping raised to {solution.damping:g} after {solution.failures} failures"
                )


def joined(context: Context, names: Sequence[str], pieces: Sequence[Solved]) -> dict[str, Solved]:
    """Returns what was chosen for each of the Linears whose tall weight has been solved in these pieces, by full name."""
    rows = [len(weight_of(context.module(name))) for name in names]
    affine = [piece for piece in pieces if isinstance(piece, tuple)]
    if not affine:
        [stored] = (piece for piece in pieces if not isinstance(piece, tuple))
        return dict(zip(names, _taken_apart(stored, rows), strict=True))
    codes, grids = affine[0][0], [grid for _, grid in affine]
    grid = grids[0]
    if len(affine) > 1:
        codes = torch.cat([part for part, _ in affine])
        zeros = [g.zero_point for g in grids if g.zero_point is not None]
        grid = replace(grid, scale=torch.cat([g.scale for g in grids]), zero_point=torch.cat(zeros) if zeros else None)
    split = [grid] if len(names) == 1 else grid.split(rows)
    return dict(zip(names, zip(codes.split(rows), split, strict=True), strict=True))


def _stacked(spec: QuantSpec, rows: int) -> bool:
    """Whether a weight of so many rows is solved as one with others of this format that read the same input."""
    if spec.affine:
        return spec.granularity in STACKED
    unit = codec_of(spec).stacked_rows
    return unit is not None and rows % unit == 0


def _taken_apart(stored: Encoded, rows: list[int]) -> list[Encoded]:
    """Returns what is stored of weights of so many rows that were solved as one, each tensor's rows in proportion."""
    if len(rows) == 1:
        return [stored]
    parts = {name: tensor.split([n * len(tensor) // sum(rows) for n in rows]) for name, tensor in stored.items()}
    return [{name: part[i].contiguous() for name, part in parts.items()} for i in range(len(rows))]


def _weight(context: Context, name: str) -> torch.Tensor:
    try:
        return checked(weight_of(context.module(name)))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
