"""FlatQuant's arithmetic (Sun et al. 2024, sections 3.1 and 3.2): a learned, Kronecker-factored affine map of a Linear's input.

Rows x become (x / d) (P1 x P2) with a diagonal d, columns of the weight W diag(d) (P1 x P2)^-T: x W^T is kept for any
invertible factors, so they are learned freely on the error that quantization makes.
"""

import math
from typing import Any

import torch
from torch import nn

from quantize.transforms.hadamard import hadamard_matrix
from quantize.transforms.kronecker import balanced_factors, kronecker_apply, kronecker_inverse, nearest_kronecker
from quantize.transforms.orthogonal import random_orthogonal
from quantize.transforms.rounding_cost import RoundingCost
from quantize.transforms.wush import wush

STARTS = ("identity", "orthogonal", "hadamard")


class AffineTransform(nn.Module):
    """The map, with parameters `left` (a, a), `right` (b, b) and `diagonal` (a * b,).

    Args:
        left: P1.
        right: P2.
        diagonal: d, none of it 0.

    Raises:
        ValueError: for shapes that do not match, or values that are not finite, or a zero in the diagonal.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, diagonal: torch.Tensor):
        super().__init__()
        if diagonal.shape != (len(left) * len(right),):
            raise ValueError(
                f"diagonal: shape {tuple(diagonal.shape)} is not valid: expected ({len(left) * len(right)},)"
            )
        for name, tensor in (("left", left), ("right", right), ("diagonal", diagonal)):
            if not bool(torch.isfinite(tensor).all()) or (name == "diagonal" and bool((tensor == 0).any())):
                raise ValueError(f"{name}: holds NaN, inf or a zero divisor: expected finite numbers")
        self.left = nn.Parameter(left.detach().clone())
        self.right = nn.Parameter(right.detach().clone())
        self.diagonal = nn.Parameter(diagonal.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (x / d) (P1 x P2) of `x` (..., a * b), in the type of `x`; computed in the parameters' type."""
        return kronecker_apply(x.to(self.diagonal.dtype) / self.diagonal, self.left, self.right).to(x.dtype)

    def inverse_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns W diag(d) (P1 x P2)^-T of `weight` (out, a * b), in its type: what reads the transformed input.

        Raises:
            ValueError: for a factor that is singular.
        """
        left, right = kronecker_inverse(self.left, self.right)
        return kronecker_apply(weight.to(self.diagonal.dtype) * self.diagonal, left.t(), right.t()).to(weight.dtype)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the `x` (..., a * b) whose `forward` is the argument."""
        left, right = kronecker_inverse(self.left, self.right)
        return (kronecker_apply(x.to(self.diagonal.dtype), left, right) * self.diagonal).to(x.dtype)


def affine_from_scale(
    scale: torch.Tensor, start: str = "identity", seed: int = 0, factors: tuple[int, int] | None = None
) -> AffineTransform:
    """Returns a transform with the diagonal `scale` (width,) (ones for none, or SmoothQuant's) in the type of `scale`.

    Args:
        scale: (width,), which the input is divided by.
        start: both factors: ``identity``, ``orthogonal`` (random, by the seed) or ``hadamard``.
        seed: of ``orthogonal``.
        factors: (a, b); None: as near to each other as divisors are.

    Raises:
        ValueError: for an unknown start, or factors whose product is not the width.
    """
    if start not in STARTS:
        raise ValueError(f"start: {start!r} is not valid: expected one of {', '.join(STARTS)}")
    a, b = balanced_factors(len(scale)) if factors is None else factors
    kind: dict[str, Any] = {"dtype": scale.dtype, "device": scale.device}
    if start == "identity":
        left, right = torch.eye(a, **kind), torch.eye(b, **kind)
    elif start == "orthogonal":
        left, right = random_orthogonal(a, seed, **kind), random_orthogonal(b, seed + 1, **kind)
    else:
        left, right = hadamard_matrix(a, **kind), hadamard_matrix(b, **kind)
    return AffineTransform(left, right, scale)


def affine_from_moments(
    hessian: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    hadamard: bool = True,
    factors: tuple[int, int] | None = None,
    damping: float = 1e-2,
) -> tuple[AffineTransform, float]:
    """Returns WUSH's transform on Kronecker-factored second moments, and the relative error of the worse factorisation.

    Both second moments, taken behind the diagonal, are replaced by their nearest Kronecker products of positive definite
    factors; the closed form of a Kronecker product is the Kronecker product of the closed forms. Unlike the nearest product
    of the dense transform it does not depend on which of the equivalent rotations of it was taken.

    Args:
        hessian: X^T X / n (width, width).
        gram: W^T W (width, width).
        scale: diagonal d (width,), which the input is divided by; its type is that of the result.
        hadamard: multiply each factor by a Hadamard matrix.
        factors: (a, b); None: as near to each other as divisors are.
        damping: share of the mean diagonal of each factor that is added to it.

    Raises:
        ValueError: as `nearest_kronecker` and `wush`.
    """
    a, b = balanced_factors(len(scale)) if factors is None else factors
    wide = scale.double()
    *inputs, error_inputs = nearest_kronecker(hessian.double() / wide / wide[:, None], a, b)
    *weights, error_weights = nearest_kronecker(gram.double() * wide * wide[:, None], a, b)
    left, right = (
        wush(_positive(h), _positive(g), hadamard=hadamard, damping=damping).activation[0]
        for h, g in zip(inputs, weights, strict=True)
    )
    return AffineTransform(left.to(scale), right.to(scale), scale), max(error_inputs, error_weights)


def log_determinant(transform: AffineTransform) -> torch.Tensor:
    """Returns log |det| of the map, a scalar; differentiable."""
    left, right = torch.linalg.slogdet(transform.left), torch.linalg.slogdet(transform.right)
    size_left, size_right = len(transform.left), len(transform.right)
    return size_right * left.logabsdet + size_left * right.logabsdet - transform.diagonal.abs().log().sum()


def cost_of(transform: AffineTransform, cost: RoundingCost) -> torch.Tensor:
    """Returns what rounding costs behind the map, a scalar; differentiable."""
    return cost(transform(cost.rows), transform.inverse_weight(cost.weight), log_determinant(transform))


def learned_affine(
    start: AffineTransform, cost: RoundingCost, steps: int = 40, rate: float = 0.02
) -> tuple[AffineTransform, float, float]:
    """Returns the map after Adam's steps on the cost, the best one on the way, in float32; and the cost before and after.

    The diagonal is learned by its logarithm, so that it keeps its signs. The rate falls to a tenth by a cosine.

    Args:
        start: where the steps begin.
        cost: of rounding, with the rows and weights that it is measured on.
        steps: 0 returns the start.
        rate: of Adam, for entries of factors whose squares have a mean of 1 over the width.

    Raises:
        ValueError: for steps below 0 or a rate that is not above 0.
    """
    if steps < 0:
        raise ValueError(f"steps: {steps} is not valid: expected 0 or more")
    if not rate > 0:
        raise ValueError(f"rate: {rate} is not valid: expected a number above 0, such as 0.02")
    begun = normalised(start)
    left, right = (p.detach().clone().requires_grad_() for p in (begun.left, begun.right))
    signs, logs = begun.diagonal.detach().sign(), begun.diagonal.detach().abs().log().requires_grad_()
    optimizer = torch.optim.Adam([left, right, logs], lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), rate / 10)
    best, least, first = begun, float("inf"), float("inf")
    with torch.enable_grad():
        for step in range(steps + 1):
            now = _functional(left, right, signs * logs.exp())
            loss = cost_of(now, cost)
            value = float(loss.detach())
            first = value if step == 0 else first
            if value < least:
                best, least = AffineTransform(left, right, signs * logs.exp()), value
            if step == steps or not math.isfinite(value):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return best, first, least


def normalised(transform: AffineTransform) -> AffineTransform:
    """Returns the same map but for a number, in float32: both factors with squares of mean 1 a row, a diagonal of geometric mean 1."""
    left, right, diagonal = (p.detach().double() for p in (transform.left, transform.right, transform.diagonal))
    left, right = (f * (len(f) ** 0.5 / torch.linalg.norm(f)) for f in (left, right))
    diagonal = diagonal / diagonal.abs().log().mean().exp()
    return AffineTransform(left.float(), right.float(), diagonal.float())


def _functional(left: torch.Tensor, right: torch.Tensor, diagonal: torch.Tensor) -> AffineTransform:
    """Returns a map of these very tensors, which gradients reach."""
    transform = AffineTransform(left, right, diagonal)
    for name, tensor in (("left", left), ("right", right), ("diagonal", diagonal)):
        delattr(transform, name)
        setattr(transform, name, tensor)
    return transform


def _positive(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric part: rounding alone parts it from the matrix."""
    return (matrix + matrix.t()) / 2
