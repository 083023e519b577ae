"""GPTQ (Frantar et al. 2022) on the quantized stream: each block's Hessians come from what the blocks before it give."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ptq.calibration.samples import Samples, Watcher
from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError
from ptq.network.network import Block, weight_of
from ptq.ranks.reduction import by_cost, done_by, in_order
from ptq.ranks.world import Message
from ptq.steps._solved import heard, told
from ptq.steps._solving import BlockInputs, Solved, captures_of, quantize_linear, refuse_without_levels, specs_of
from ptq.steps._step import REFERENCE, SAMPLES, Context, Solver, StepPlan
from ptq.steps.solvers._tall_weight import TallWeight, joined, pieces_of
from ptq.steps.solvers._target_moments import INPUT, Moments, Part, error_of
from quantize.modules.simulated import InputQuantizer
from quantize.solvers.correction import ErrorMoment
from quantize.solvers.gptq import (
    SCALES,
    GptqOptions,
    Hessian,
    quantized_weights,
)
from quantize.solvers.tiles.block_feedback import has_tiles
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
            carry the samples through the unquantized network too, and keep what they need of one block. Experts have
            ``present`` whatever is asked for, and the run's log says so: their tokens come in an order of the route.
        scales: how scales are fitted before the rounding: ``range``, as the scheme says, or by a search for the least error
            weighed by the Hessian's ``diagonal``, by its ``pivots`` (what an error costs once later columns have made up
            for it), or by the ``block`` of the Hessian that belongs to the columns of one scale.
        descent: sweeps of coordinate descent on scales and codes after the rounding.
        relative: an error that a token carries in the residual stream counts relative to the size of that token's stream
            there, since the norms that read it divide by that; otherwise a few tokens of massive activations outweigh all
            others. Only with target residual.
        held_out: one sample in so many is held out while the strength with which ``original`` and ``residual`` make up for
            errors is chosen, for each Linear, by the error that is left on those samples (with none at all where that is
            best); then all samples count. 0 takes `damping` for it.
        search_damping: choose the damping of each weight among 0.01 to 1 by its loss on the held out samples; five solutions
            for one.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    sequential: bool = True
    target: str = option("present", choices=("present", "original", "residual"))
    scales: str = option("range", choices=SCALES)
    descent: int = option(0, least=0)
    relative: bool = option(False, only_with={"target": ("residual",)})
    held_out: int = option(0, least=0)
    search_damping: bool = False


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
        if options.target == "residual" and not options.sequential:
            raise UserError(
                "steps.gptq.sequential: false does not go with target 'residual': two Linears of a block would both take "
                "back the same error: use sequential true, or target original"
            )
        if options.held_out < 0 or options.held_out == 1:
            raise UserError(
                f"steps.gptq.held_out: {options.held_out} is not valid: expected 0, or 2 or more so that samples are left: use 8"
            )
        if options.held_out and options.target == "present" and not options.search_damping:
            raise UserError(
                "steps.gptq.held_out: nothing is chosen by held out samples with target present and search_damping false: use 0"
            )
        if options.search_damping and not options.held_out:
            raise UserError("steps.gptq.search_damping: true needs samples to go by: use held_out 8")
        super().__init__(options)
        self.solving, self.sequential, self.target = solving, options.sequential, options.target

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the calibration samples, and what static input ranges need.

        Raises:
            UserError: for formats without levels, and options that need levels for a format of tiles.
        """
        refuse_without_levels(scheme, "gptq", tiles=True)
        for spec in tensor_specs(scheme, "weight"):
            if has_tiles(spec):
                try:
                    self.solving.check_tiles(spec)
                except ValueError as error:
                    raise UserError(f"steps.gptq.{error}") from None
        return captures_of(scheme) | {SAMPLES} | (frozenset() if self.target == "present" else {REFERENCE})

    @property
    def weighs(self) -> bool:
        """By what the Linear reads."""
        return True

    def quantized(
        self, weight: torch.Tensor, hessian: torch.Tensor, formats: Mapping[str, QuantSpec]
    ) -> dict[str, torch.Tensor]:
        """Solves for the weight's own output: no error before it is made up for, and the damping is `damping`."""
        return quantized_weights(weight, hessian, formats, self.solving)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        _Solving(self, block, context).run()


class _Solving:
    """GPTQ of one block."""

    def __init__(self, step: Step, block: Block, context: Context):
        self.step, self.block, self.context = step, block, context
        self.samples: Samples = context.samples_of("steps.gptq")
        # Experts get rows of tokens in an order of the route, which is another one in the unquantized network.
        routed = block.experts.values() if step.target != "present" else ()
        self.by_route = {name for names in routed for name in names}

    def run(self) -> None:
        """Quantizes the block's Linears in place."""
        context, block, samples = self.context, self.block, self.samples
        if self.by_route and block is next(b for b in context.network.blocks if b.experts):
            context.note(
                f"gptq: experts have target present, not {self.step.target}: the router may send their tokens elsewhere"
            )
        stages = context.stages(block)
        sums = context.sums(block) if self.step.target == "residual" else {}
        originals = self._originals(stages, sums)
        inputs = BlockInputs(context, block)
        if not self.step.sequential:
            self._quantize(stages, inputs, sums, originals)
            return
        with samples.stage_by_stage(block, stages, set(context.rests(block).values()) if sums else ()) as present:
            for together in present:
                self._quantize(together, inputs, sums, originals)

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
        solved = self._solved_by_all(moments)
        for name in (name for stage in stages for name in stage):
            specs = specs_of(self.context, name)
            if specs.any:
                chosen = partial(_chosen, solved[name]) if name in solved else None
                quantize_linear(self.context, name, specs, inputs.of(name, specs), chosen)

    def _originals(self, stages: list[tuple[str, ...]], sums: dict[str, str]) -> dict[str, torch.Tensor]:
        """Returns what the unquantized network has where the targets need it: inputs by first name of a stage, and sums."""
        if self.step.target == "present":
            return {}
        plain = [stage[0] for stage in stages if not set(stage) <= {*sums, *self.by_route}]
        return self.samples.advance_reference(self.block, list(dict.fromkeys([*plain, *sums.values()])))

    def _moments(
        self, stage: tuple[str, ...], inputs: BlockInputs, sums: dict[str, str], originals: dict[str, torch.Tensor]
    ) -> list[Moments]:
        """Returns empty moments for the Linears of a stage whose weights are to be solved: one for each input quantizer, and
        one for each Linear whose target is a sum.
        """
        made: dict[tuple[InputQuantizer | None, str], Moments] = {}
        flow = self.samples.flow
        for name in stage:
            specs = specs_of(self.context, name)
            if specs.weight is None:
                continue
            key = inputs.of(name, specs), name if name in sums else ""
            if key not in made:
                module, place = self.context.module(name), sums.get(name)
                weight, rest = weight_of(module), None if place is None else self._rest_of(name)
                made[key] = Moments(
                    first=stage[0],
                    quantizer=key[0],
                    length=flow.ids.shape[1],
                    leaf=flow.leaf,
                    empty=partial(self._part, name, weight, error_of(place, rest)),
                    original=originals.get(sums.get(name, stage[0])),
                    held=self._held if self.step.options.held_out else None,
                    weight=weight,
                    bias=module.bias if isinstance(module.bias, torch.Tensor) else None,
                    place=place,
                    rest=rest,
                    relative=self.step.options.relative,
                )
            made[key].names.append(name)
        return list(made.values())

    def _rest_of(self, name: str) -> str | None:
        """Returns the module that reads what a Linear's output is added to, where that is known: a hook may change the output."""
        return None if self.context.module(name)._forward_hooks else self.context.rests(self.block).get(name)

    def _part(self, name: str, weight: torch.Tensor, of: str) -> Part:
        rows, columns = (weight.shape[1], weight.shape[1]) if of == INPUT else weight.shape
        own = self.step.target == "present" or name in self.by_route
        error = None if own else ErrorMoment(rows, columns, weight.device)
        return Part(Hessian(columns, weight.device), error, of)

    def _held(self, sample: int) -> bool:
        """Whether the sample of that number is held out."""
        every = self.step.options.held_out
        return sample % every == every - 1

    def _feed(self, moments: list[Moments]) -> None:
        """Lets the samples pass, and every moment see what it needs."""
        watchers: dict[str, list[Watcher]] = {}
        for m in moments:
            if m.rest is not None:
                watchers.setdefault(m.rest, []).append(m.see_rest)
        for m in moments:
            watchers.setdefault(m.first, []).append(m.see)
            if m.place is not None and m.rest is None:
                watchers.setdefault(m.place, []).append(m.see_sum)
        if watchers:
            self.samples.feed(self.block, {name: partial(_all, found) for name, found in watchers.items()}, shared=True)

    def _solved_by_all(self, moments: list[Moments]) -> dict[str, Solved]:
        """Returns what was chosen for all Linears of these moments, by name: each rank solves for some of them.

        Where there are fewer moments than ranks, ranks share the rows of a weight.
        """
        world, context = self.samples.stream.world, self.context
        pieces = [piece for number, m in enumerate(moments) for piece in pieces_of(context, number, m.names)]
        by_rows = len(moments) < world.size
        of_moments = by_cost([m.cost for m in moments], world.size)
        owners = [of_moments[piece.moments] for piece in pieces]
        if by_rows:
            owners = in_order([piece.cost for piece in pieces], world.size)
        for m, owner in zip(moments, of_moments, strict=True):
            m.reduce(world, None if by_rows else owner)
        mine = [piece for piece, owner in zip(pieces, owners, strict=True) if owner == world.rank]
        last = {piece.moments: piece for piece in mine}
        for number, m in enumerate(moments):
            m.parts = m.parts if number in last else ()
        tall: list[TallWeight] = []

        def work(number: int) -> Message:
            piece = pieces[number]
            if not tall or tall[0].names != piece.names:
                tall.clear()
                own = [p for p in mine if p.names == piece.names]
                tall.append(TallWeight(context, self.step.options, self.step.solving, own, moments[piece.moments]))
            message = told({piece.names[0]: tall[0].solved(piece)}, list(tall[0].notes))
            if piece is last[piece.moments]:
                moments[piece.moments].parts = ()
                tall.clear()
            return message

        found: dict[tuple[str, ...], list[Solved]] = {}
        for piece, message in zip(pieces, done_by(world, owners, work), strict=True):
            solved, notes = heard(message, self.samples.stream.device)
            for line in notes if not piece.rows.start else ():
                context.note(line)
            found.setdefault(piece.names, []).append(solved[piece.names[0]])
        return {name: of for names, parts in found.items() for name, of in joined(context, names, parts).items()}


def _chosen(solved: Solved, weight: torch.Tensor) -> Solved:
    return solved


def _all(watchers: list[Watcher], x: torch.Tensor, tokens: slice) -> None:
    for watcher in watchers:
        watcher(x, tokens)
