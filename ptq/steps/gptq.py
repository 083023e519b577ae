"""GPTQ (Frantar et al. 2022) on the quantized stream: each block's Hessians come from what the blocks before it give."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ptq.config import SchemeConfig
from ptq.errors import UserError, nearest
from ptq.network import Block, weight_of
from ptq.steps.attention_inputs import quantize_attention
from ptq.steps.base import REFERENCE, SAMPLES, SOLVER, Plan
from ptq.steps.solving import BlockInputs, captures_of, check_integers, labels_of, quantize_linear, specs_of
from quantize.affine import Grid
from quantize.gptq import GptqOptions, Hessian, Solution, solve
from quantize.linear import InputQuantizer
from quantize.spec import QuantSpec
from quantize.target import CrossMoment, corrected_weight


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
            is to give the original output on the original input, and makes up for the layers before it. The second
            carries the samples through the unquantized network too, and keeps a block's inputs of it.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    sequential: bool = True
    target: str = "present"


TARGETS = ("present", "original")


class Step:
    """Replaces the block's Linears by `QuantLinear` with weights solved by GPTQ."""

    kind: ClassVar[str] = SOLVER

    def __init__(self, options: Options):
        try:
            self.options = GptqOptions(options.damping, options.block, options.act_order, options.static_groups)
        except ValueError as error:
            raise UserError(f"steps.gptq.{error}") from None
        if options.target not in TARGETS:
            raise UserError(
                f"steps.gptq.target: {options.target!r} is not valid: expected one of {', '.join(TARGETS)}"
                f"{nearest(options.target, TARGETS)}"
            )
        self.sequential, self.corrects = options.sequential, options.target == "original"

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the calibration samples, and what static input ranges need. `UserError` for weights that are not integers."""
        check_integers(scheme, "gptq")
        return captures_of(scheme) | {SAMPLES} | ({REFERENCE} if self.corrects else frozenset())

    def plan(self, plan: Plan) -> None:
        """Keeps what `apply` needs."""
        self._plan = plan

    def apply(self, block: Block) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        plan = self._plan
        if plan.samples is None:
            raise UserError("steps.gptq: needs calibration samples, and none were drawn")
        stages = plan.stages(block)
        firsts = [stage[0] for stage in stages]
        originals = plan.samples.advance_reference(block, firsts) if self.corrects else {}
        quantize_attention(plan, block)
        inputs = BlockInputs(plan, block)
        for group in [[stage] for stage in stages] if self.sequential else [stages]:
            moments = {stage[0]: self._moments(stage, inputs) for stage in group}
            watchers = {name: partial(_see, m, originals.get(name)) for name, m in moments.items() if m}
            if watchers:
                plan.samples.feed(block, watchers)
            for name in (name for stage in group for name in stage):
                self._solve(name, inputs, moments)

    def _moments(self, stage: tuple[str, ...], inputs: BlockInputs) -> "list[_Moments]":
        """Returns empty moments for the Linears of a stage whose weights are to be solved, one for each input quantizer."""
        made: dict[InputQuantizer | None, _Moments] = {}
        for name in stage:
            specs = specs_of(self._plan, name)
            if specs.weight is not None:
                weight = weight_of(self._plan.network.model.get_submodule(name))
                quantizer, size = inputs.of(name, specs), weight.shape[1]
                cross = CrossMoment(size, weight.device) if self.corrects else None
                made.setdefault(quantizer, _Moments([], quantizer, Hessian(size, weight.device), cross)).names.append(
                    name
                )
        return list(made.values())

    def _solve(self, name: str, inputs: BlockInputs, moments: "dict[str, list[_Moments]]") -> None:
        specs = specs_of(self._plan, name)
        if specs.any:
            mine = next((m for stage in moments.values() for m in stage if name in m.names), None)
            chosen = None if mine is None or specs.weight is None else partial(self._codes, name, specs.weight, mine)
            quantize_linear(self._plan, name, specs, inputs.of(name, specs), chosen)

    def _codes(
        self, name: str, spec: QuantSpec, moments: "_Moments", weight: torch.Tensor
    ) -> tuple[torch.Tensor, Grid]:
        hessian = moments.hessian.matrix
        if moments.cross is not None:
            weight = corrected_weight(weight, moments.cross.matrix, hessian, self.options.damping)
        labels = labels_of(self._plan, name, spec, "weight")
        solution: Solution = solve(weight, hessian, spec, self.options, labels)
        if solution.fallback:
            self._plan.note(f"gptq: {name}: its Hessian could not be factorised: rounded to nearest instead")
        elif solution.damping > self.options.damping:
            self._plan.note(f"gptq: {name}: damping raised to {solution.damping:g}")
        return solution.codes, solution.grid


@dataclass(frozen=True)
class _Moments:
    """Second moments of one tensor, as the Linears `names` get it: rounded by `quantizer`."""

    names: list[str]
    quantizer: InputQuantizer | None
    hessian: Hessian
    cross: CrossMoment | None

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the Linears will really multiply by."""
        y: torch.Tensor = x if self.quantizer is None else self.quantizer(x)
        return y


def _see(moments: list[_Moments], originals: torch.Tensor | None, x: torch.Tensor, tokens: slice) -> None:
    for m in moments:
        y = m.rounded(x)
        m.hessian.update(y)
        if m.cross is not None and originals is not None:
            m.cross.update(originals[tokens].to(y.device), y.reshape(-1, y.shape[-1]))
