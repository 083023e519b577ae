"""GPTQ's loop over columns: each is rounded, and those not yet rounded make up for its error (Frantar et al. 2022, eq. 2 to 4)."""

from typing import Protocol

import torch

from quantize.kernels.matmul import product
from quantize.solvers.levels import Levels


class Reached(Protocol):
    """Told when column `j` is about to be rounded, in a block from `start` whose `errors` so far reach it through `gather`."""

    def __call__(
        self, j: int, start: int, columns: torch.Tensor, gather: torch.Tensor, errors: torch.Tensor
    ) -> None: ...


def round_with_feedback(
    columns: torch.Tensor,
    triangle: torch.Tensor,
    labels: list[int],
    levels: Levels,
    block: int,
    reached: Reached | None = None,
) -> torch.Tensor:
    """Returns the levels (in, out) of rounding column by column; the values are these times the scale of their label.

    The weight is held transposed, so that a column is contiguous. Inside a block the errors are not spread to the later
    columns one by one: a column gathers those of the columns before it when its turn comes, one matrix-vector product.

    Args:
        columns: the weight's columns in the order of rounding, float32 (in, out); overwritten.
        triangle: V of `quantize.solvers.factorisation.Factor`.
        labels: of the columns, in that order.
        levels: what they can be rounded to.
        block: columns after which the errors are carried to all later columns; changes the time, not the result.
        reached: told of every column before it is rounded.
    """
    steps = torch.empty_like(columns)
    gather = triangle.t().contiguous()
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:end])
        # Views are made a block at a time: one by one they would cost as much as the arithmetic.
        parts = (columns[start:end], steps[start:end], errors, gather[start:end, start:end])
        before = errors.t()
        for i, (column, step, error, shares) in enumerate(zip(*(part.unbind() for part in parts), strict=True)):
            if reached is not None:
                reached(start + i, start, columns, gather, errors)
            if i:
                column.addmv_(before[:, :i], shares[:i], alpha=-1)
            scale = levels.round(labels[start + i], column, step)
            torch.addcmul(column, step, scale, value=-1, out=error)
        columns[end:] -= product(gather[end:, start:end], errors)
    return steps
