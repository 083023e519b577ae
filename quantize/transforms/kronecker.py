"""Products with Kronecker-factored matrices A x B, and the nearest such matrix (Van Loan & Pitsianis 1993).

A row x (a * b,) seen as X (a, b), row by row, gives x (A x B) = A^T X B: a * b * (a + b) multiplications instead of (a * b)^2.
"""

import math

import torch


def balanced_factors(width: int) -> tuple[int, int]:
    """Returns (a, b) with a b = width, a <= b, as near to each other as divisors are.

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width: {width} is not valid: expected 1 or more channels")
    a = next(d for d in range(math.isqrt(width), 0, -1) if width % d == 0)
    return a, width // a


def kronecker_apply(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns x (left x right): (..., a * b) in the type of the operands; differentiable.

    Args:
        x: (..., a * b).
        left: (a, a).
        right: (b, b).

    Raises:
        ValueError: when a factor is not square, or a * b is not the last dimension of `x`.
    """
    for name, factor in (("left", left), ("right", right)):
        if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
            raise ValueError(f"{name}: shape {tuple(factor.shape)} is not valid: expected a square matrix")
    a, b = len(left), len(right)
    if x.shape[-1] != a * b:
        raise ValueError(f"x: {x.shape[-1]} channels, expected {a} x {b} = {a * b}")
    return torch.matmul(left.t(), x.reshape(-1, a, b) @ right).reshape(x.shape)


def kronecker_inverse(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors of (left x right)^-1: the factors' inverses; differentiable.

    Raises:
        ValueError: for a factor that is singular.
    """
    result = []
    for name, factor in (("left", left), ("right", right)):
        try:
            result.append(torch.linalg.inv(factor))
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"{name}: the factor is singular: expected an invertible matrix") from error
    return result[0], result[1]


def nearest_kronecker(matrix: torch.Tensor, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns A (a, a) and B (b, b) that minimise |matrix - A x B| in the Frobenius norm, and that norm relative to |matrix|.

    The rows of the rearranged matrix (a^2, b^2) are its (b, b) blocks: the best product is its first pair of singular vectors.
    Both factors have equal norms, and a positive trace for A where that is possible: a symmetric positive definite matrix
    gives two such factors. In float64 inside, in the type of `matrix` returned.

    Raises:
        ValueError: unless `matrix` is (a * b, a * b), finite and not zero.
    """
    if matrix.shape != (a * b, a * b):
        raise ValueError(f"matrix: shape {tuple(matrix.shape)} is not valid: expected {(a * b, a * b)}")
    wide = matrix.double()
    norm = torch.linalg.norm(wide)
    if not bool(torch.isfinite(norm)) or float(norm) == 0:
        raise ValueError("matrix: zero, or holds NaN or inf: expected a finite matrix that is not zero")
    blocks = wide.reshape(a, b, a, b).permute(0, 2, 1, 3).reshape(a * a, b * b)
    # The smaller Gram matrix has the same singular vectors, at a fraction of the price of an SVD of the whole.
    tall = blocks if a <= b else blocks.t()
    first = torch.linalg.eigh(tall @ tall.t())[1][:, -1]
    second = first @ tall
    size = torch.linalg.norm(second)
    u, v = first * size.sqrt(), second / size.sqrt()
    left, right = (u, v) if a <= b else (v, u)
    left, right = left.reshape(a, a), right.reshape(b, b)
    sign = torch.where(left.trace() < 0, -1.0, 1.0)
    error = float((1 - (size / norm).square()).clamp(min=0).sqrt())
    return (left * sign).to(matrix.dtype), (right * sign).to(matrix.dtype), error
