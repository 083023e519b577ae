"""RTN: every weight is rounded to the nearest point of its grid; its ranges may be searched by what an error weighs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.network.network import Block
from ptq.steps._moments import stage_hessians
from ptq.steps._solving import (
    BlockInputs,
    Solved,
    captures_of,
    labels_of,
    quantize_linear,
    refuse_without_levels,
    specs_of,
    values_of,
)
from ptq.steps._step import RESIDUAL, SAMPLES, Context, Solver, StepPlan
from quantize.solvers.clip import nearest_clipped
from quantize.spec.quant_spec import QuantSpec

SCALES = ("range", "diagonal", "block")
"""How scales are fitted: see `Options`."""
FEW = 4
"""Bits of a weight that a rotation is known to leave worse rounded."""


@dataclass(frozen=True)
class Options:
    """How scales are fitted.

    Attributes:
        scales: ``range``, as the scheme says, which needs no data; or by a search of clipped ranges for the least error of
            rounding, weighed by the Hessian's ``diagonal``, or by the ``block`` of the Hessian that belongs to the columns of
            one scale (with one scale a row: the error of the Linear's output).
    """

    scales: str = option("range", choices=SCALES)


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` with weights rounded to nearest."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """What the static input ranges of the scheme need, and the samples where scales are searched.

        Raises:
            UserError: for a search of scales that a format of the scheme does not have.
        """
        if self.options.scales == "range":
            return captures_of(scheme)
        refuse_without_levels(scheme, "rtn.scales")
        return captures_of(scheme) | {SAMPLES}

    def warned(self, scheme: SchemeConfig, acted: frozenset[str]) -> str | None:
        """Says so of few bits with one range a row after a rotation of the residual stream.

        A rotation evens out what columns weigh, of which rounding to nearest makes nothing, and leaves to each row the range of a normal
        distribution; GPTQ gains by it. What inputs gain is more than what such weights lose.
        """
        wide = any(
            s.affine and s.bits <= FEW and s.granularity in ("tensor", "channel")
            for s in tensor_specs(scheme, "weight")
        )
        if not wide or self.options.scales != "range" or RESIDUAL not in acted:
            return None
        return (
            "rtn: weights of few bits with one range a row lose more to rounding to nearest after a rotation of the stream than without one, "
            "and less to GPTQ: use steps.gptq in place of steps.rtn"
        )

    @property
    def weighs(self) -> bool:
        """Where scales are searched."""
        return self.options.scales != "range"

    def quantized(
        self, weight: torch.Tensor, hessian: torch.Tensor, formats: Mapping[str, QuantSpec]
    ) -> dict[str, torch.Tensor]:
        """Rounds to nearest with scales searched for this weight."""
        return {
            form: values_of(self._clipped(hessian, spec, None, weight), spec, weight.shape)
            for form, spec in formats.items()
        }

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        inputs, stages = BlockInputs(context, block), context.stages(block)
        if self.options.scales == "range" or context.samples is None:
            for stage in stages:
                self._quantize(stage, inputs, {}, context)
            return
        with context.samples.stage_by_stage(block, stages) as present:
            for stage in (stage for together in present for stage in together):
                self._quantize(stage, inputs, stage_hessians(context, block, stage, inputs), context)

    def _quantize(
        self, stage: tuple[str, ...], inputs: BlockInputs, hessians: dict[str, torch.Tensor], context: Context
    ) -> None:
        for name in stage:
            specs = specs_of(context, name)
            if not specs.any:
                continue
            solve = None
            if specs.weight is not None and name in hessians and bool(hessians[name].any()):
                labels = labels_of(context, name, specs.weight, "weight")
                solve = partial(self._clipped, hessians[name], specs.weight, labels)
            quantize_linear(context, name, specs, inputs.of(name, specs), solve)

    def _clipped(
        self, hessian: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None, weight: torch.Tensor
    ) -> Solved:
        weighing = hessian.diagonal() if self.options.scales == "diagonal" else hessian
        return nearest_clipped(weight, spec, weighing, labels)
