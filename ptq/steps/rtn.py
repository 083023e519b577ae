"""RTN: every weight is rounded to the nearest point of its grid. No data beyond static input ranges."""

from dataclasses import dataclass

import torch

from ptq.errors import UserError
from ptq.network import Block, replace_module, weight_of
from ptq.scheme import LinearSpecs, resolve
from ptq.steps.base import Plan
from quantize.linear import InputQuantizer, QuantLinear
from quantize.spec import QuantSpec


@dataclass(frozen=True)
class Options:
    """RTN has no options: the scheme says everything."""


class Step:
    """Replaces the block's Linears by `QuantLinear` with weights rounded to nearest."""

    def __init__(self, options: Options):
        self.options = options

    def plan(self, plan: Plan) -> None:
        """Keeps what `apply` needs."""
        self._plan = plan

    def apply(self, block: Block) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        inputs = SharedInputs(self._plan)
        for name, module in block.linears.items():
            specs = resolve(self._plan.scheme, name, self._plan.roles.get(name))
            if specs.any:
                bias = module.bias if isinstance(module.bias, torch.Tensor) else None
                try:
                    quantized = QuantLinear(weight_of(module), bias, specs.weight, inputs.of(name, specs), specs.output)
                except ValueError as error:
                    raise UserError(f"{name}: {error}") from None
                replace_module(self._plan.network.model, name, quantized)


class SharedInputs:
    """Gives the Linears of a block that read one link with one spec the same `InputQuantizer`: it is rounded once."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._made: dict[tuple[object, QuantSpec], InputQuantizer] = {}

    def of(self, name: str, specs: LinearSpecs) -> InputQuantizer | None:
        """Returns the quantizer of the input of the Linear `name`, or None where the scheme leaves it alone."""
        if specs.input is None:
            return None
        key = (self._plan.producers.get(name, name), specs.input)
        if key not in self._made:
            self._made[key] = InputQuantizer(specs.input, input_range(self._plan, name, specs))
        return self._made[key]


def input_range(plan: Plan, name: str, specs: LinearSpecs) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns per-channel (min, max) of the input of the Linear `name` when its input range is static, else None."""
    if specs.input is None or specs.input.dynamic:
        return None
    if plan.statistics is None:
        raise UserError(f"scheme.input.dynamic: false for {name} needs calibration statistics, and there are none")
    statistics = plan.statistics.inputs[name]
    return statistics.min, statistics.max
