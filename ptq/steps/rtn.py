"""RTN: every weight is rounded to the nearest point of its grid. No data beyond static input ranges."""

from dataclasses import dataclass

import torch
from torch import nn

from ptq.errors import UserError
from ptq.network import Block, replace_module, weight_of
from ptq.scheme import LinearSpecs, resolve
from ptq.steps.base import Plan
from quantize.linear import InputQuantizer, QuantLinear


@dataclass(frozen=True)
class Options:
    """RTN has no options: the scheme says everything."""


class Step:
    """Replaces the block's Linears by `QuantLinear` with weights rounded to nearest."""

    def __init__(self, options: Options):
        self.options = options

    def plan(self, plan: Plan) -> None:
        """Keeps what `apply` needs. Raises `UserError` when static ranges are asked for and there are no statistics."""
        self._plan = plan

    def apply(self, block: Block) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        shared: dict[tuple[str, object], InputQuantizer] = {}
        for name, module in block.linears.items():
            specs = resolve(self._plan.scheme, name, self._plan.roles.get(name))
            if specs.any:
                quantized = quantize_linear(name, module, specs, self._range(name, specs))
                share_input(quantized, name, specs, self._plan, shared)
                replace_module(self._plan.network.model, name, quantized)

    def _range(self, name: str, specs: LinearSpecs) -> tuple[torch.Tensor, torch.Tensor] | None:
        return input_range(self._plan, name, specs)


def input_range(plan: Plan, name: str, specs: LinearSpecs) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns per-channel (min, max) of the input of the Linear `name` when its input range is static, else None."""
    if specs.input is None or specs.input.dynamic:
        return None
    if plan.statistics is None:
        raise UserError(f"scheme.input.dynamic: false for {name} needs calibration statistics, and there are none")
    statistics = plan.statistics.inputs[name]
    return statistics.min, statistics.max
