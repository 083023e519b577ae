"""Low-rank correction (LQER, Zhang et al. 2024; CALDERA, Saha et al. 2024): W ~ Q + L R, of what rounding loses where the
Hessian weighs it most.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError
from ptq.network.network import Block, weight_of
from ptq.steps._moments import stage_hessians
from ptq.steps._solving import (
    BlockInputs,
    Solved,
    captures_of,
    labels_of,
    quantize_linear,
    refuse_without_levels,
    specs_of,
)
from ptq.steps._step import CORRECTION, SAMPLES, Context, Solver, StepPlan
from quantize.codecs.base import checked
from quantize.codecs.registry import codec_of
from quantize.grid.affine import dequantize, grouped, quantize
from quantize.grid.ranges import weight_grid
from quantize.solvers.gptq import GptqOptions, solve, solve_format
from quantize.solvers.lowrank import corrected
from quantize.spec.quant_spec import QuantSpec

SOLVERS = ("gptq", "rtn")
"""What quantizes the weight that is corrected."""


@dataclass(frozen=True)
class Options:
    """How much is corrected.

    Attributes:
        rank: of L R, 1 or more; both are kept in fp16 and counted in the bits: 16 rank (out + in) / (out in) a weight.
        rounds: 1 corrects what was quantized once; more quantize again what L R leaves, and keep the best round.
        solver: what quantizes: ``gptq`` or ``rtn``.
        damping: share of the Hessian's mean diagonal that is added to it.
    """

    rank: int = option(16, least=1)
    rounds: int = option(1, least=1)
    solver: str = option("gptq", choices=SOLVERS)
    damping: float = option(0.01, least=1e-6, most=1)


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` with a correction of low rank beside the codes.

    The correction is a second product beside the Linear's own: exports write it as an adapter, or refuse it.
    """

    acts: ClassVar[frozenset[str]] = frozenset({CORRECTION})

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the samples, and what static input ranges need. `UserError` for weights without levels, or none at all."""
        refuse_without_levels(scheme, "lowrank", tiles=True)
        if not tensor_specs(scheme, "weight"):
            raise UserError("scheme.weight: null, so steps.lowrank has nothing to correct: use steps.rtn={}")
        return captures_of(scheme) | {SAMPLES}

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes and corrects the block's Linears in place, each on what the ones before it give."""
        samples = context.samples_of("steps.lowrank")
        inputs, stages = BlockInputs(context, block), context.stages(block)
        with samples.stage_by_stage(block, stages) as present:
            for stage in (stage for together in present for stage in together):
                hessians = stage_hessians(context, block, stage, inputs)
                for name in stage:
                    self._quantize(name, inputs, hessians, context)

    def _quantize(self, name: str, inputs: BlockInputs, hessians: dict[str, torch.Tensor], context: Context) -> None:
        specs = specs_of(context, name)
        if not specs.any:
            return
        if specs.weight is None:
            quantize_linear(context, name, specs, inputs.of(name, specs))
            return
        options, hessian = self.options, hessians[name]
        labels = labels_of(context, name, specs.weight, "weight")
        rounded = partial(self._rounded, hessian, specs.weight, labels)
        try:
            weight = checked(weight_of(context.module(name)))
            found = corrected(weight, hessian, options.rank, rounded, options.rounds, options.damping)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        if not bool(hessian.any()):
            context.note(f"lowrank: {name}: no token reached it: all its columns weigh alike")
        solved, factors = found.solution, found.factors
        quantize_linear(context, name, specs, inputs.of(name, specs), lambda w: solved, factors)

    def _rounded(
        self, hessian: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Solved]:
        """Returns the values (out, in) of a weight and what is stored of them."""
        damped = GptqOptions(self.options.damping)
        if not spec.affine:
            codec = codec_of(spec)
            stored = codec.encode(weight, spec)
            if self.options.solver == "gptq":
                stored = solve_format(weight, hessian, spec, damped).stored
            return codec.decode(stored, spec, weight.shape), stored
        if self.options.solver == "gptq":
            solution = solve(weight, hessian, spec, damped, labels)
            codes, grid = solution.codes, solution.grid
        else:
            grid = weight_grid(weight, spec, labels)
            spread = grid if labels is None else grid.of_channels(labels)
            codes = quantize(grouped(weight, spec), spread).reshape(weight.shape)
        spread = grid if labels is None else grid.of_channels(labels)
        return dequantize(grouped(codes, spec), spread).reshape(weight.shape), (codes, grid)
