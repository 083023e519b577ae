"""GPTQ (Frantar et al. 2022) on the quantized stream: each block's Hessians come from what the blocks before it give."""

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ptq.calibration.samples import Samples, Watcher
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError, nearest
from ptq.network.network import Block, weight_of
from ptq.steps._moments import samples_of
from ptq.steps._solving import (
    BlockInputs,
    Solved,
    captures_of,
    labels_of,
    quantize_linear,
    refuse_without_levels,
    specs_of,
)
from ptq.steps._step import REFERENCE, SAMPLES, Context, Solver, StepPlan
from quantize.codecs.base import checked
from quantize.kernels.matmul import product
from quantize.modules.simulated import InputQuantizer
from quantize.solvers.correction import ErrorMoment, corrected_weight
from quantize.solvers.gptq import FormatSolution, GptqOptions, Hessian, Solution, solve, solve_format
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class Options:
    """How GPTQ solves.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to it; escalates where Cholesky fails.
        block: columns whose error is carried on together.
        act_order: columns by descending diagonal of the Hessian.
        static_groups: fit the grids on the original weights, before any error is carried.
        sequential: solve the Linears of a block in the order of their calls, each on what the quantized ones before it
            give (true sequential); otherwise all on the unquantized block's inputs, in one pass.
        target: ``present``: each Linear keeps its own output on the input it gets now, as published; ``original``: it
            is to give the original output on the original input, and makes up for the layers before it; ``residual``: as
            original, and a Linear whose output is added to the residual stream takes back what it can of the error that
            the stream carries there (only with `sequential`: otherwise two Linears take back the same error). The last two
            carry the samples through the unquantized network too, and keep what they need of one block.
        scales: how scales are fitted before the rounding: ``range``, as the scheme says, or by a search for the least error
            weighed by the Hessian's ``diagonal``, by its ``pivots`` (what an error costs once later columns have made up
            for it), or by the ``block`` of the Hessian that belongs to the columns of one scale.
        descent: sweeps of coordinate descent on scales and codes after the rounding.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    sequential: bool = True
    target: str = "present"
    scales: str = "range"
    descent: int = 0


STACKED = ("channel", "group")
"""Granularities whose grids belong to one row."""
TARGETS = ("present", "original", "residual")


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` with weights solved by GPTQ."""

    def __init__(self, options: Options):
        try:
            solving = GptqOptions(
                options.damping,
                options.block,
                options.act_order,
                options.static_groups,
                options.scales,
                options.descent,
            )
        except ValueError as error:
            raise UserError(f"steps.gptq.{error}") from None
        if options.target not in TARGETS:
            raise UserError(
                f"steps.gptq.target: {options.target!r} is not valid: expected one of {', '.join(TARGETS)}"
                f"{nearest(options.target, TARGETS)}"
            )
        if options.target == "residual" and not options.sequential:
            raise UserError(
                "steps.gptq.sequential: false does not go with target 'residual': two Linears of a block would both take "
                "back the same error: use sequential true, or target original"
            )
        super().__init__(options)
        self.solving, self.sequential, self.target = solving, options.sequential, options.target

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the calibration samples, and what static input ranges need. `UserError` for formats without levels."""
        refuse_without_levels(scheme, "gptq")
        return captures_of(scheme) | {SAMPLES} | (frozenset() if self.target == "present" else {REFERENCE})

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        _Solving(self, block, context).run()


class _Solving:
    """GPTQ of one block."""

    def __init__(self, step: Step, block: Block, context: Context):
        if context.samples is None:
            raise UserError("steps.gptq: needs calibration samples, and none were drawn")
        self.step, self.options, self.block, self.context = step, step.solving, block, context
        self.samples: Samples = context.samples

    def run(self) -> None:
        """Quantizes the block's Linears in place."""
        context, block, samples = self.context, self.block, self.samples
        stages = context.stages(block)
        sums = context.sums(block) if self.step.target == "residual" else {}
        originals = self._originals(stages, sums)
        inputs = BlockInputs(context, block)
        if not self.step.sequential:
            self._quantize(stages, inputs, sums, originals)
            return
        with samples.stage_by_stage(block, stages) as present:
            for stage in present:
                self._quantize([stage], inputs, sums, originals)

    def _quantize(
        self,
        stages: list[tuple[str, ...]],
        inputs: BlockInputs,
        sums: dict[str, str],
        originals: dict[str, torch.Tensor],
    ) -> None:
        """Quantizes the Linears of these stages, on what reaches them now."""
        moments = [m for stage in stages for m in self._moments(stage, inputs, sums, originals)]
        self._feed(moments)
        solved = {name: found for m in moments for name, found in self._solved(m).items()}
        for name in (name for stage in stages for name in stage):
            specs = specs_of(self.context, name)
            if specs.any:
                chosen = partial(_chosen, solved[name]) if name in solved else None
                quantize_linear(self.context, name, specs, inputs.of(name, specs), chosen)

    def _originals(self, stages: list[tuple[str, ...]], sums: dict[str, str]) -> dict[str, torch.Tensor]:
        """Returns what the unquantized network has where the targets need it: inputs by first name of a stage, and sums."""
        if self.step.target == "present":
            return {}
        plain = [stage[0] for stage in stages if not set(stage) <= set(sums)]
        return self.samples.advance_reference(self.block, list(dict.fromkeys([*plain, *sums.values()])))

    def _moments(
        self, stage: tuple[str, ...], inputs: BlockInputs, sums: dict[str, str], originals: dict[str, torch.Tensor]
    ) -> "list[_Moments]":
        """Returns empty moments for the Linears of a stage whose weights are to be solved: one for each input quantizer, and
        one for each Linear whose target is a sum.
        """
        made: dict[tuple[InputQuantizer | None, str], _Moments] = {}
        for name in stage:
            specs = specs_of(self.context, name)
            if specs.weight is None:
                continue
            key = inputs.of(name, specs), name if name in sums else ""
            if key not in made:
                weight = weight_of(self.context.network.model.get_submodule(name))
                rows, columns = weight.shape if name in sums else (weight.shape[1], weight.shape[1])
                error = None if self.step.target == "present" else ErrorMoment(rows, columns, weight.device)
                original = originals.get(sums.get(name, stage[0]))
                made[key] = _Moments(stage[0], key[0], Hessian(columns, weight.device), error, original)
                if name in sums:
                    made[key] = replace(made[key], place=sums[name], weight=weight)
            made[key].names.append(name)
        return list(made.values())

    def _feed(self, moments: "list[_Moments]") -> None:
        """Lets the samples pass, and every moment see what it needs."""
        watchers: dict[str, list[Watcher]] = {}
        for m in moments:
            watchers.setdefault(m.first, []).append(m.see)
            if m.place is not None:
                watchers.setdefault(m.place, []).append(m.see_sum)
        if watchers:
            self.samples.feed(self.block, {name: partial(_all, found) for name, found in watchers.items()})

    def _solved(self, moments: "_Moments") -> dict[str, Solved]:
        """Returns what was chosen for the Linears that share these moments, by name.

        Rows do not see one another, so the Linears whose rows have grids of their own are solved as one tall weight: one
        factorisation, and one pass over the columns.
        """
        together: dict[tuple[QuantSpec, str], list[str]] = {}
        for name in moments.names:
            spec = specs_of(self.context, name).weight
            if spec is not None:
                stacked = spec.affine and spec.granularity in STACKED
                together.setdefault((spec, "" if stacked else name), []).append(name)
        solved: dict[str, Solved] = {}
        for (spec, _), names in together.items():
            solved.update(self._codes(names, spec, moments))
        return solved

    def _codes(self, names: list[str], spec: QuantSpec, moments: "_Moments") -> dict[str, Solved]:
        weights = [_weight(self.context, name) for name in names]
        weight, hessian = torch.cat([w.float() for w in weights]), moments.hessian.matrix
        labels = labels_of(self.context, names[0], spec, "weight")
        try:
            if moments.error is not None:
                weight = corrected_weight(weight, moments.of_outputs(weight), hessian, self.options.damping)
            if not spec.affine:
                of_format = solve_format(weight, hessian, spec, self.options)
                self._note(names, of_format)
                return {names[0]: of_format.stored}
            solution: Solution = solve(weight, hessian, spec, self.options, labels)
        except ValueError as error:
            raise UserError(f"{', '.join(names)}: {error}") from None
        self._note(names, solution)
        rows = [len(w) for w in weights]
        grids = [solution.grid] if len(names) == 1 else solution.grid.split(rows)
        return dict(zip(names, zip(solution.codes.split(rows), grids, strict=True), strict=True))

    def _note(self, names: list[str], solution: Solution | FormatSolution) -> None:
        """Says where a Hessian could not be factorised as it was."""
        for name in names:
            if solution.fallback:
                why = (
                    f"its Hessian could not be factorised in {solution.failures} tries"
                    if solution.failures
                    else "no token reached it"
                )
                self.context.note(f"gptq: {name}: {why}: rounded to nearest instead")
            elif solution.damping > self.options.damping:
                self.context.note(
                    f"gptq: {name}: damping raised to {solution.damping:g} after {solution.failures} failures"
                )


def _chosen(solved: Solved, weight: torch.Tensor) -> Solved:
    return solved


def _weight(context: Context, name: str) -> torch.Tensor:
    try:
        return checked(weight_of(context.module(name)))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


@dataclass(frozen=True)
class _Moments:
    """Second moments of the tensor that `first` reads, as the Linears `names` get it: rounded by `quantizer`.

    `error` is of that tensor against the `original` one (tokens, channels), or, for a Linear with this `weight` whose output
    is part of the sum at `place`, of that sum: what is missing there when the Linear multiplies the rounded input.
    """

    first: str
    quantizer: InputQuantizer | None
    hessian: Hessian
    error: ErrorMoment | None
    original: torch.Tensor | None
    place: str | None = None
    weight: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)
    _latest: list[torch.Tensor] = field(default_factory=list)

    def see(self, x: torch.Tensor, tokens: slice) -> None:
        """Adds a batch of the tensor, a sample at a time, so that sums do not depend on the batch size; a `Watcher`."""
        # Rounded before samples lie one after another: a range is a sample's own.
        y: torch.Tensor = x if self.quantizer is None else self.quantizer(x)
        samples = samples_of(x)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1])
        for rows in samples:
            self.hessian.update(y[rows])
        if self.place is not None:
            self._latest[:] = [x, y]
        elif self.error is not None and self.original is not None:
            error = self.original[tokens].to(y.device) - y
            for rows in samples:
                self.error.update(error[rows], y[rows])

    def see_sum(self, total: torch.Tensor, tokens: slice) -> None:
        """Adds the same batch of the sum, of which the Linear's output on the input not rounded is a part; a `Watcher`."""
        x, y = self._latest
        if self.error is not None and self.original is not None and self.weight is not None:
            missing = self.original[tokens].to(total.device) - total.reshape(-1, total.shape[-1])
            if self.quantizer is not None:
                missing = missing + product(x - y, self.weight.t())
            for rows in samples_of(total):
                self.error.update(missing[rows], y[rows])

    def of_outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the moment of the error of the outputs, (out, in), of a Linear with this weight."""
        if self.error is None:
            return torch.zeros_like(weight)
        return self.error.matrix if self.place is not None else weight.double() @ self.error.matrix.double()


def _all(watchers: list[Watcher], x: torch.Tensor, tokens: slice) -> None:
    for watcher in watchers:
        watcher(x, tokens)
