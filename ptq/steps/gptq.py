"""GPTQ (Frantar et al. 2022) on the quantized stream: each block's Hessians come from what the blocks before it give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ptq.config import SchemeConfig
from ptq.errors import UserError
from ptq.network import Block, weight_of
from ptq.steps.attention_inputs import quantize_attention
from ptq.steps.base import SAMPLES, SOLVER, Plan
from ptq.steps.solving import BlockInputs, captures_of, labels_of, quantize_linear, specs_of
from quantize.affine import Grid
from quantize.gptq import GptqOptions, Hessian, Solution, solve
from quantize.linear import InputQuantizer


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
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    sequential: bool = True


class Step:
    """Replaces the block's Linears by `QuantLinear` with weights solved by GPTQ."""

    kind: ClassVar[str] = SOLVER

    def __init__(self, options: Options):
        try:
            self.options = GptqOptions(options.damping, options.block, options.act_order, options.static_groups)
        except ValueError as error:
            raise UserError(f"steps.gptq.{error}") from None
        self.sequential = options.sequential

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the calibration samples, and what static input ranges need."""
        return captures_of(scheme) | {SAMPLES}

    def plan(self, plan: Plan) -> None:
        """Keeps what `apply` needs."""
        self._plan = plan

    def apply(self, block: Block) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        quantize_attention(self._plan, block)
        inputs = BlockInputs(self._plan, block)
        stages = self._plan.stages(block)
        for group in [[stage] for stage in stages] if self.sequential else [stages]:
            self._solve(block, group, inputs)

    def _solve(self, block: Block, stages: Sequence[tuple[str, ...]], inputs: BlockInputs) -> None:
        """Takes the Hessians of some stages in one pass, then solves their Linears."""
        plan = self._plan
        if plan.samples is None:
            raise UserError("steps.gptq: needs calibration samples, and none were drawn")
        specs = {name: specs_of(plan, name) for stage in stages for name in stage}
        quantizers = {name: inputs.of(name, spec) for name, spec in specs.items() if spec.any}
        hessians: dict[str, dict[InputQuantizer | None, Hessian]] = {}
        for stage in stages:
            wanted = {quantizers[name] for name in stage if specs[name].weight is not None}
            if wanted:
                weight = weight_of(plan.network.model.get_submodule(stage[0]))
                hessians[stage[0]] = {q: Hessian(weight.shape[1], weight.device) for q in wanted}

        def watch(first: str, x: torch.Tensor) -> None:
            for quantizer, hessian in hessians[first].items():
                # The Hessian of what the Linear will really multiply by: its quantized input.
                hessian.update(x if quantizer is None else quantizer(x))

        if hessians:
            plan.samples.feed(block, {first: lambda x, first=first: watch(first, x) for first in hessians})  # type: ignore[misc]
        for stage in stages:
            for name in (name for name in stage if specs[name].any):
                quantizer = quantizers[name]
                hessian = hessians[stage[0]][quantizer] if specs[name].weight is not None else None
                quantize_linear(plan, name, specs[name], quantizer, lambda w, n=name, h=hessian: self._codes(n, w, h))  # type: ignore[misc]

    def _codes(self, name: str, weight: torch.Tensor, hessian: Hessian | None) -> tuple[torch.Tensor, Grid]:
        spec = specs_of(self._plan, name).weight
        if spec is None or hessian is None:
            raise ValueError("no format for the weight")
        labels = labels_of(self._plan, name, spec, "weight")
        solution: Solution = solve(weight, hessian.matrix, spec, self.options, labels)
        if solution.fallback:
            self._plan.note(f"gptq: {name}: its Hessian could not be factorised: rounded to nearest instead")
        elif solution.damping > self.options.damping:
            self._plan.note(f"gptq: {name}: damping raised to {solution.damping:g}")
        return solution.codes, solution.grid
