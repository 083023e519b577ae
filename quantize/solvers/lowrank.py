"""Low-rank correction W ~ Q + L R of what a quantized weight loses, weighed by the Hessian (LQER, Zhang et al. 2024; CALDERA,
Saha et al. 2024, algorithm 1 for the alternation)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from quantize.checks import all_finite
from quantize.kernels.matmul import product, row_squares

T = TypeVar("T")


@dataclass(frozen=True)
class Factors:
    """A matrix (out, in) of rank r as a product.

    Attributes:
        left: L, (out, r).
        right: R, (r, in).
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def bits(self) -> int:
        """Bits of both."""
        return 8 * sum(t.numel() * t.element_size() for t in (self.left, self.right))

    def product(self) -> torch.Tensor:
        """Returns L R in float32, (out, in)."""
        return product(self.left.float(), self.right.float())


@dataclass(frozen=True)
class Corrected(Generic[T]):
    """A quantized weight and its correction.

    Attributes:
        solution: what the quantizer gave for W - L R.
        factors: L and R, in the type in which they are kept.
        losses: tr(D H D^T) / (2 out), D = W - Q - L R, without correction and after each round.
    """

    solution: T
    factors: Factors
    losses: list[float]


@torch.no_grad()
def low_rank_factors(
    residual: torch.Tensor, hessian: torch.Tensor, rank: int, damping: float = 0.01, dtype: torch.dtype = torch.float32
) -> Factors:
    """Returns L R of rank `rank` with the least tr((E - L R) H (E - L R)^T), E the residual: the truncated SVD of E H^1/2.

    Computed in float64. Where out <= in, L has the leading eigenvectors of E H E^T and R = L^T E, which needs no root of H.

    Args:
        residual: E, (out, in).
        hessian: H, (in, in), symmetric.
        rank: 1 or more; above the weight's own rank it is that.
        damping: share of the diagonal's mean that is added to H, above 0: what no token used is corrected last.
        dtype: of L and R.

    Raises:
        ValueError: for shapes that do not fit, NaN or inf, a rank below 1 or damping not above 0, or a Hessian that is not positive definite.
    """
    rows, size = residual.shape
    if hessian.shape != (size, size):
        raise ValueError(f"hessian: shape {tuple(hessian.shape)} does not fit a residual {tuple(residual.shape)}")
    if rank < 1 or not damping > 0:
        raise ValueError(f"rank, damping: {rank}, {damping} are not valid: expected 1 or more, and a number above 0")
    if not (all_finite(residual) and all_finite(hessian)):
        raise ValueError("residual, hessian: NaN or inf")
    wide, rank = residual.double(), min(rank, rows, size)
    mean = hessian.double().diagonal().mean()
    damped = hessian.double() / torch.where(mean > 0, mean, torch.ones_like(mean))
    damped.diagonal().add_(damping)
    if rows <= size:
        vectors = torch.linalg.eigh(wide @ damped @ wide.t()).eigenvectors[:, -rank:].flip(1)
        left, right = vectors, vectors.t() @ wide
    else:
        root, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise ValueError(f"hessian: not positive definite with damping {damping:g}: use more")
        vectors = torch.linalg.eigh(root.t() @ (wide.t() @ wide) @ root).eigenvectors[:, -rank:].flip(1)
        left = wide @ (root @ vectors)
        right = torch.linalg.solve_triangular(root.t(), vectors, upper=True).t()
    # Alike in size, so that neither leaves a 16-bit type's range.
    sizes = left.norm(dim=0), right.norm(dim=1)
    balance = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), torch.ones_like(sizes[0]))
    return Factors((left * balance).to(dtype), (right / balance[:, None]).to(dtype))


@torch.no_grad()
def corrected(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rank: int,
    quantized: Callable[[torch.Tensor], tuple[torch.Tensor, T]],
    rounds: int = 1,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float16,
) -> Corrected[T]:
    """Alternates Q = quantized(W - L R) and L R = the best correction of W - Q, and returns the round with the least loss.

    Args:
        weight: (out, in).
        hessian: H = 2 X^T X / n, (in, in).
        rank: of the correction.
        quantized: gives, of a weight (out, in), the values (out, in) that its codes stand for, and whatever else is to be kept.
        rounds: 1 corrects what was quantized once; more alternate.
        damping: as in `low_rank_factors`.
        dtype: in which L and R are kept; what they lose by it is part of the loss.

    Raises:
        ValueError: as `low_rank_factors`, or for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: {rounds} is not valid: expected 1 or more")
    weight, hessian = weight.float(), hessian.float()
    values, solution = quantized(weight)
    losses = [_loss(weight - values, hessian)]
    best: tuple[T, Factors] | None = None
    for round_ in range(rounds):
        factors = low_rank_factors(weight - values, hessian, rank, damping, dtype)
        found = _loss(weight - values - factors.product(), hessian)
        if best is None or found < min(losses[1:]):
            best = solution, factors
        losses.append(found)
        if round_ + 1 < rounds:
            values, solution = quantized(weight - factors.product())
    if best is None:
        raise ValueError("rounds: none was made")
    return Corrected(*best, losses)


def _loss(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(row_squares(difference, hessian).clamp_(min=0).mean()) / 2
