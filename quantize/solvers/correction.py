"""What a quantized Linear should reproduce when its input has changed too: what it gave before anything was quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantize.checks import all_finite
from quantize.kernels.matmul import product

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Dampings of `corrected_weight` to try, as shares of the mean of the Hessian's diagonal."""


class ErrorMoment:
    """Accumulates D = 2 E^T Y / n over n tokens: what the input Y of a quantized Linear tells of an error E.

    The differences are accumulated, not two near equal moments: nothing cancels.

    Args:
        rows: channels of the error.
        columns: channels of the input.
        device: where both are.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._sum = torch.zeros(rows, columns, device=device)

    @torch.no_grad()
    def update(self, error: torch.Tensor, present: torch.Tensor) -> None:
        """Adds tokens: the error (..., rows) and the input (..., columns). Raises `ValueError` for other shapes."""
        shapes = tuple(error.shape), tuple(present.shape)
        if shapes[0][:-1] != shapes[1][:-1] or (shapes[0][-1], shapes[1][-1]) != self._sum.shape:
            expected = f"(tokens, {self._sum.shape[0]}) and (tokens, {self._sum.shape[1]})"
            raise ValueError(f"error, present: shapes {shapes[0]} and {shapes[1]}, expected {expected}")
        e, y = (t.detach().reshape(-1, t.shape[-1]).float() for t in (error, present))
        self._sum += product(e.t(), y)
        self.count += len(y)

    def merge(self, other: "ErrorMoment") -> None:
        """Adds the tokens that `other` has seen, in place."""
        self._sum += other._sum
        self.count += other.count

    def clear(self) -> None:
        """Forgets all tokens, and keeps the memory."""
        self._sum.zero_()
        self.count = 0

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what has been accumulated, by name: another process's `from_state` goes on with it."""
        return {"sum": self._sum, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "ErrorMoment":
        """Returns the moment whose `state` this is."""
        made = cls(0, 0)
        made._sum, made.count = state["sum"], int(state["count"])
        return made

    def with_tokens_of(self, other: "ErrorMoment") -> "ErrorMoment":
        """Returns the moment of the tokens of both."""
        both = ErrorMoment(0, 0)
        both._sum, both.count = self._sum + other._sum, self.count + other.count
        return both

    @property
    def matrix(self) -> torch.Tensor:
        """D, float32 (rows, columns); zeros before the first token."""
        return self._sum * (2 / max(self.count, 1))


@dataclass(frozen=True)
class DampedFactor:
    """Factors of H + d I in float64, d = damping times the mean of diag(H): what is left of an error is divided by small eigenvalues.

    Attributes:
        matrix: (in, in), the lower Cholesky factor; where there is none (H is summed in float32), L and U of the pivoted one.
        pivots: of the latter, or None.
    """

    matrix: torch.Tensor
    pivots: torch.Tensor | None = None

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Returns (H + d I)^-1 `right`, float64 (in, columns)."""
        if self.pivots is None:
            return torch.cholesky_solve(right, self.matrix)
        return torch.linalg.lu_solve(self.matrix, self.pivots, right)


@torch.no_grad()
def damped_factor(hessian: torch.Tensor, damping: float) -> DampedFactor | None:
    """Returns what `corrected_weight` divides by, None where the diagonal is 0.

    Args:
        hessian: H, (in, in).
        damping: above 0.

    Raises:
        ValueError: for NaN or inf, or a damping that is not above 0.
    """
    if not damping > 0:
        raise ValueError(f"damping: {damping} is not valid: expected a number above 0, such as 0.01")
    if not all_finite(hessian):
        raise ValueError("hessian: NaN or inf")
    mean = hessian.diagonal().mean()
    if mean == 0:
        return None
    damped = hessian.double()
    damped.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return DampedFactor(lower)
    return DampedFactor(*torch.linalg.lu_factor(damped))


@torch.no_grad()
def corrected_weight(
    weight: torch.Tensor,
    moment: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    factor: DampedFactor | None = None,
) -> torch.Tensor:
    """Returns the weight (out, in) that takes an error E of the outputs back, as far as the present input Y tells it.

    min_V |E + W Y - V Y|^2 + d |V - W|^2 with d = `damping` times the mean of diag(H): V = W + M (H + d I)^-1, M = 2 E Y^T / n.
    Since |E + W Y - Q Y|^2 = |(V - Q) Y|^2 + a constant (for d = 0), a solver given V and H minimises the error that is left.
    With E = W (X - Y), X the original input, the outputs come closest to the original ones: M = W D, D the `ErrorMoment`
    of X - Y.

    Args:
        weight: (out, in).
        moment: M, (out, in).
        hessian: H = 2 Y^T Y / n, (in, in).
        damping: above 0; how strongly V is held to W where the tokens say little.
        factor: what `damped_factor` made of this Hessian with this damping; None where it has not been called.

    Raises:
        ValueError: for shapes that do not fit, NaN or inf, or a damping that is not above 0.
    """
    size = weight.shape[1]
    if moment.shape != weight.shape or hessian.shape != (size, size):
        raise ValueError(
            f"moment, hessian: shapes {tuple(moment.shape)}, {tuple(hessian.shape)} do not fit {tuple(weight.shape)}"
        )
    if not all_finite(moment):
        raise ValueError("moment: NaN or inf")
    factor = factor or damped_factor(hessian, damping)
    if factor is None:
        return weight
    change = factor.solve(moment.double().t())
    return (weight.double() + change.t()).to(weight.dtype)


@torch.no_grad()
def told_by_input(error: torch.Tensor, factor: DampedFactor) -> torch.Tensor:
    """Returns D (H + d I)^-1, float32 (in, in): what the present input tells of the error of the input itself.

    A weight W times that is the change of `corrected_weight` for M = W D, for weights with more rows than columns in a fraction of the work.

    Args:
        error: D, the `ErrorMoment` of X - Y, (in, in).
        factor: of H + d I.

    Raises:
        ValueError: for NaN or inf.
    """
    if not all_finite(error):
        raise ValueError("error: NaN or inf")
    return factor.solve(error.double().t()).t().float()


@torch.no_grad()
def held_out_strength(
    fit: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    dampings: Sequence[float] = STRENGTHS,
) -> float | None:
    """Returns the damping of `corrected_weight` with which a correction fitted to some tokens leaves others the least error.

    With K = V - W the error on other tokens is a constant + tr(K H' K^T) - 2 tr(K M'^T), primes for those tokens. A Hessian of
    few tokens says more than is true of the text: none of the corrections may be better than W itself. In the eigenvectors Q of
    H = Q diag(l) Q^T, K Q is M Q times a diagonal 1 / (l + d): both traces follow for every d from Q^T H' Q, Q^T M^T M Q and the
    diagonal of Q^T M^T M' Q.

    Args:
        fit: M (out, in) and H (in, in) of the tokens that the correction is fitted to.
        held: the same of other tokens.
        dampings: to try, above 0.

    Returns:
        The best damping; None where W itself leaves less error than every correction.

    Raises:
        ValueError: for shapes that do not fit, or NaN or inf.
    """
    if fit[0].shape != held[0].shape or fit[1].shape != held[1].shape or fit[0].shape[1] != len(fit[1]):
        raise ValueError(
            f"held: shapes {tuple(held[0].shape)}, {tuple(held[1].shape)} do not fit {tuple(fit[0].shape)}"
        )
    if not all(all_finite(t) for t in (*fit, *held)):
        raise ValueError("fit, held: NaN or inf")
    mean = float(fit[1].diagonal().mean())
    if mean == 0:
        return None
    # In float32: the moments are summed in it, and what it loses of an eigenvalue is far less than what is added to it.
    values, vectors = torch.linalg.eigh(fit[1].float())
    moment, theirs = (product(m.float(), vectors) for m in (fit[0], held[0]))
    theirs_square = product(product(vectors.t(), held[1].float()), vectors)
    square = (theirs_square * product(moment.t(), moment)).double()
    gain = (moment.double() * theirs.double()).sum(0)
    values, best, least = values.double().clamp_min(0), None, 0.0
    for damping in sorted(dampings):
        share = 1 / (values + damping * mean)
        loss = float(share @ square @ share - 2 * (gain @ share))
        if loss < least:
            best, least = damping, loss
    return best
