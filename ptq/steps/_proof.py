"""Transforms are proved, not trusted: a block computes the same before and after one, on real calibration data."""

from dataclasses import dataclass

import torch

from ptq.errors import UserError
from ptq.network.block_stream import Flow
from ptq.network.links import change_error, tolerance_of
from ptq.network.network import Block
from ptq.steps._step import Context, Step, StepPlan


@dataclass
class Proof:
    """The largest relative error that a transform has shown so far, and its block."""

    error: float = 0.0
    tolerance: float = 0.0
    block: str = ""

    def add(self, error: float, tolerance: float, block: str) -> None:
        """Adds the error of one block."""
        if not self.block or error > self.error:
            self.error, self.tolerance, self.block = error, tolerance, block

    def sentence(self, name: str) -> str:
        """Returns what the run's log says of the transform `name`."""
        return f"{name}: proved on every block, largest relative error {self.error:.1e} ({self.block}, {self.tolerance:.1e} allowed)"


@torch.no_grad()
def prove(
    name: str, step: Step, plan: StepPlan, block: Block, context: Context, flow: Flow, hidden: torch.Tensor
) -> tuple[float, float]:
    """Applies the transform `step` to `block` and compares the block's output on the first batch of `flow`.

    Where the step turns the residual stream both outputs are compared in the new basis.

    Args:
        name: the step's name in the recipe.
        step: the transform.
        plan: what it has decided.
        block: its weights are in memory.
        context: what the step sees.
        flow: how the model calls the block.
        hidden: the first batch (samples, length, channels), in the basis before the step.

    Returns:
        The relative error, and what rounding may cause at most.

    Raises:
        UserError: when the error is beyond that tolerance.
    """
    before = context.stream.call(flow, block, 0, hidden)
    step.apply(block, plan, context)
    if plan.basis is not None:
        hidden, before = plan.basis.forward(hidden), plan.basis.forward(before)
    error = change_error(hidden, before, context.stream.call(flow, block, 0, hidden))
    tolerance = tolerance_of(hidden, before)
    if not error <= tolerance:
        raise UserError(
            f"steps.{name}: changes the output of {block.name} by {error:.1e} (relative; rounding explains {tolerance:.1e}): "
            f"it is not function-preserving on this model: remove it with ~steps.{name}, or report it"
        )
    return error, tolerance
