"""HQQ (Badri and Shaji 2023): ranges fitted to each weight alone by half-quadratic splitting, then rounding. No data."""

from dataclasses import dataclass
from functools import partial

import torch

from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.network.network import Block
from ptq.steps._solving import BlockInputs, Solved, captures_of, labels_of, quantize_linear, require_integers, specs_of
from ptq.steps._step import Context, Solver, StepPlan
from quantize.grid.affine import grouped, quantize
from quantize.solvers.hqq import ITERATIONS, NORM, hqq_grid
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class Options:
    """How ranges are fitted.

    Attributes:
        iterations: of the alternation of errors and ranges, 0 or more.
        norm: p of the sum of |error|^p that is made small: the lower, the less a few great errors weigh.
    """

    iterations: int = option(ITERATIONS, least=0)
    norm: float = option(NORM, least=0.05, most=1)


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` with weights rounded on HQQ's ranges."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """What the static input ranges of the scheme need. `UserError` for weights of another format than int."""
        require_integers(scheme, "hqq")
        return captures_of(scheme)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        inputs = BlockInputs(context, block)
        for name in (name for stage in context.stages(block) for name in stage):
            specs = specs_of(context, name)
            if not specs.any:
                continue
            solve = None
            if specs.weight is not None:
                solve = partial(self._codes, specs.weight, labels_of(context, name, specs.weight, "weight"))
            quantize_linear(context, name, specs, inputs.of(name, specs), solve)

    def _codes(self, spec: QuantSpec, labels: torch.Tensor | None, weight: torch.Tensor) -> Solved:
        grid = hqq_grid(weight, spec, labels, self.options.iterations, self.options.norm)
        spread = grid if labels is None else grid.of_channels(labels)
        return quantize(grouped(weight, spec), spread).reshape(weight.shape), grid
