"""RTN: every weight is rounded to the nearest point of its grid. No data beyond static input ranges."""

from dataclasses import dataclass
from typing import ClassVar

from ptq.config.schema import SchemeConfig
from ptq.network.network import Block
from ptq.steps._attention import quantize_attention
from ptq.steps._solving import BlockInputs, captures_of, quantize_linear, specs_of
from ptq.steps._step import SOLVER, Plan


@dataclass(frozen=True)
class Options:
    """RTN has no options: the scheme says everything."""


class Step:
    """Replaces the block's Linears by `QuantLinear` with weights rounded to nearest."""

    kind: ClassVar[str] = SOLVER

    def __init__(self, options: Options):
        self.options = options

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """What the static input ranges of the scheme need."""
        return captures_of(scheme)

    def plan(self, plan: Plan) -> None:
        """Keeps what `apply` needs."""
        self._plan = plan

    def apply(self, block: Block) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        quantize_attention(self._plan, block)
        inputs = BlockInputs(self._plan, block)
        for name in (name for stage in self._plan.stages(block) for name in stage):
            specs = specs_of(self._plan, name)
            if specs.any:
                quantize_linear(self._plan, name, specs, inputs.of(name, specs))
