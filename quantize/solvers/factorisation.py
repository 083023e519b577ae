"""The factor of a Hessian that GPTQ's error feedback runs on, and what happens when there is none at first."""

from dataclasses import dataclass

import torch

from quantize.checks import all_finite
from quantize.kernels.matmul import product

ESCALATIONS = 4
"""Dampings tried, each 10 times the one before, until Cholesky succeeds."""
SMALL = 128
"""Rows of a triangular matrix that is inverted at once; greater ones by halves."""


@dataclass(frozen=True)
class Factor:
    """H + damping mean(diag H) I = (V^-1)^T diag(pivots) V^-1 in an order of the columns: the root-free Cholesky factor.

    Attributes:
        order: the columns in the order of rounding, int64 (in,).
        triangle: V, unit upper triangular (in, in): an error e in column j is made up for by -e V_jc in the later column c.
        pivots: what a squared error in each column costs when all later columns make up for it as well as they can, (in,),
            in that order; relative to the mean of the Hessian's diagonal. Their sum over squared errors is GPTQ's loss.
        damping: share of the diagonal's mean that was added.
        failures: dampings with which Cholesky failed before that one.
    """

    order: torch.Tensor
    triangle: torch.Tensor
    pivots: torch.Tensor
    damping: float
    failures: int

    def damped(self, hessian: torch.Tensor) -> torch.Tensor:
        """Returns the matrix that was factorised, in the columns' own order: its diagonal had a mean of 1 before damping."""
        mean = _mean(hessian.diagonal())
        damped = hessian / mean
        damped.diagonal().add_(self.damping)
        return damped


@dataclass(frozen=True)
class Failure:
    """Why there is no factor: no column is used (`failures` 0), or every damping failed, the greatest being `damping`."""

    damping: float
    failures: int


def factorise(hessian: torch.Tensor, damping: float, act_order: bool) -> Factor | Failure:
    """Returns the factor with the least damping of `damping` times 1, 10, 100, 1000 with which Cholesky succeeds.

    From H = R R^T with R upper triangular (Cholesky of the reversed matrix) follows H^-1 = U^T U with U = R^-1: neither H^-1
    nor a second Cholesky is needed.

    Args:
        hessian: float32 (in, in), symmetric; a column with 0 on the diagonal is not used, and has 1 there.
        damping: above 0, as a share of the mean of the used part of the diagonal.
        act_order: order the columns by descending diagonal; else as they are.
    """
    diagonal = hessian.diagonal()
    order = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(hessian), device=hessian.device)
    )
    # The last column first: its lower Cholesky factor is R, seen from the other end.
    matrix, used = _reversed(hessian, order)
    if not used.any():
        return Failure(damping, 0)
    share, diagonal = damping, matrix.diagonal().clone()
    for attempt in range(ESCALATIONS):
        share = damping * 10**attempt
        matrix.diagonal().copy_(diagonal + share)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and all_finite(factor):
            upper = factor.flip(0, 1)
            del factor
            pivots = upper.diagonal().clone()
            triangle = torch.zeros_like(upper)
            _invert(upper.div_(pivots), triangle)
            if all_finite(triangle):
                return Factor(order, triangle, pivots.square_(), share, attempt)
    return Failure(share, ESCALATIONS)


def _reversed(hessian: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the Hessian from the last column of `order` to the first, with a mean of 1 on the diagonal of its used columns, and which
    columns are used."""
    order = order.flip(0)
    diagonal = hessian.diagonal()[order]
    used = diagonal > 0
    # Summed in the order of rounding: columns that lie in another order have the same bits.
    mean = _mean(diagonal.flip(0))
    ordered = hessian.index_select(0, order).index_select(1, order).div_(mean)
    ordered.diagonal().copy_(torch.where(used, diagonal / mean, torch.ones_like(diagonal)))
    return ordered, used


def _mean(diagonal: torch.Tensor) -> torch.Tensor:
    """Returns the mean of what is above 0, 1 where nothing is."""
    used = diagonal > 0
    return diagonal[used].mean() if used.any() else torch.ones((), device=diagonal.device)


def _invert(unit: torch.Tensor, inverse: torch.Tensor) -> None:
    """Writes the inverse of a unit upper triangular matrix (n, n) into zeros.

    By halves: the inverse of [[A, B], [0, C]] is [[A^-1, -A^-1 B C^-1], [0, C^-1]], a third of the work of solving for n
    columns.
    """
    size = len(unit)
    if size <= SMALL:
        one = torch.eye(size, device=unit.device, dtype=unit.dtype)
        inverse.copy_(torch.linalg.solve_triangular(unit, one, upper=True, unitriangular=True))
        return
    half = size // 2
    _invert(unit[:half, :half], inverse[:half, :half])
    _invert(unit[half:, half:], inverse[half:, half:])
    right = product(product(inverse[:half, :half], unit[:half, half:]), inverse[half:, half:])
    torch.neg(right, out=inverse[:half, half:])
