"""Transforms are proved, not trusted: a block computes the same before and after one, on real calibration data.

In float32, or float64 where that is not enough to tell, whatever the model runs in: a transform works on the block's
weights widened, and they are rounded to the model's own type once, when it is proved.
"""

from dataclasses import dataclass

import torch

from ptq.errors import UserError
from ptq.network.block_stream import Flow
from ptq.network.network import Block
from ptq.network.precise import change_error, precise_block, telling_output, tolerance_of
from ptq.steps._step import Context, Step, StepPlan
from quantize.kernels.matmul import fast_linears


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
def output_before(block: Block, context: Context, flow: Flow, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what `block` gives for the first batch of `flow`, `hidden`, in the precision that its transforms are proved in."""
    # Not evaluated: products may be the fast ones.
    with fast_linears():
        return telling_output(context.stream, flow, block, hidden)


@torch.no_grad()
def prove(
    name: str,
    step: Step,
    plan: StepPlan,
    block: Block,
    context: Context,
    flow: Flow,
    hidden: torch.Tensor,
    before: torch.Tensor | None = None,
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
        before: what `output_before` gives for it, where that is known.

    Returns:
        The relative error, and what rounding may cause at most.

    Raises:
        UserError: when the error is beyond that tolerance, or a weight has become too great for the model's type.
    """
    try:
        if before is None:
            before = output_before(block, context, flow, hidden)
        if not bool(torch.isfinite(before).all()):
            raise UserError(
                f"steps.{name}: {block.name} gives NaN or inf before the step: there is nothing to prove it by: "
                f"check the weights, or evaluate the model without steps"
            )
        with precise_block(context.stream, flow, block, before.dtype, keep=True) as call:
            wide = hidden.to(before.dtype)
            step.apply(block, plan, context)
            if plan.basis is not None:
                wide, before = plan.basis.forward(wide), plan.basis.forward(before)
            with fast_linears():
                after = call(wide)
            error, tolerance = change_error(wide, before, after), tolerance_of(wide, before)
            if not error <= tolerance:
                raise UserError(
                    f"steps.{name}: changes the output of {block.name} by {error:.1e} (relative; rounding explains "
                    f"{tolerance:.1e}): it is not function-preserving on this model: remove it with ~steps.{name}, or report it"
                )
    except OverflowError as problem:
        raise UserError(f"steps.{name}: {block.name}.{problem}: use model.dtype=float32, or bfloat16") from None
    return error, tolerance
