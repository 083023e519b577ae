"""RTN: every weight is rounded to the nearest point of its grid. No data beyond static input ranges."""

from dataclasses import dataclass

from ptq.config.schema import SchemeConfig
from ptq.network.network import Block
from ptq.steps._solving import BlockInputs, captures_of, quantize_linear, specs_of
from ptq.steps._step import Context, Solver, StepPlan


@dataclass(frozen=True)
class Options:
    """RTN has no options: the scheme says everything."""


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` with weights rounded to nearest."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """What the static input ranges of the scheme need."""
        return captures_of(scheme)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        inputs = BlockInputs(context, block)
        for name in (name for stage in context.stages(block) for name in stage):
            specs = specs_of(context, name)
            if specs.any:
                quantize_linear(context, name, specs, inputs.of(name, specs))
