"""Orthogonal matrices: random ones, and steps of learning that stay orthogonal (SpinQuant, Liu et al. 2024; DartQuant)."""

import torch


def random_orthogonal(
    width: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Returns a random orthogonal matrix (width, width), uniform (Haar): the QR factor of a normal one, in float64 on the CPU.

    The signs of R's diagonal are moved into Q: without that Q is not uniform, and not unique (Mezzadri 2007).

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width: {width} is not valid: expected 1 or more channels")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
    return _positive_qr(normal).to(device, dtype)


def cayley_step(matrix: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """Returns (I + rate/2 A)^-1 (I - rate/2 A) Q with the skew A = G Q^T - Q G^T (Wen & Yin 2013, equation 7).

    The Cayley factor of a skew matrix is orthogonal for any rate. One step of Newton and Schulz takes away what rounding leaves,
    so that errors do not add up over steps. In the type of `matrix`, in float32 at least; no gradient passes.

    Args:
        matrix: Q, orthogonal (width, width).
        gradient: G, of the loss by Q, of the same shape.
        rate: length of the step along -G.

    Raises:
        ValueError: for shapes that are not square and equal.
    """
    q, g = _square(matrix, gradient)
    with torch.no_grad():
        outer = g @ q.t()
        skew = (outer - outer.t()) * (rate / 2)
        identity = torch.eye(len(q), dtype=q.dtype, device=q.device)
        return _polished(torch.linalg.solve(identity + skew, q - skew @ q)).to(matrix.dtype)


def qr_step(matrix: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """Returns the Q factor of Q - rate * (G - Q sym(Q^T G)), R's diagonal positive: a step along the tangent, drawn back.

    Arguments, types and errors as `cayley_step`.
    """
    q, g = _square(matrix, gradient)
    with torch.no_grad():
        inner = q.t() @ g
        tangent = g - q @ (inner + inner.t()) / 2
        return _polished(_positive_qr(q - rate * tangent)).to(matrix.dtype)


def _square(matrix: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: shape {tuple(matrix.shape)} is not valid: expected (width, width)")
    if gradient.shape != matrix.shape:
        raise ValueError(f"gradient: shape {tuple(gradient.shape)} is not valid: expected {tuple(matrix.shape)}")
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return matrix.detach().to(dtype), gradient.detach().to(dtype)


def _positive_qr(matrix: torch.Tensor) -> torch.Tensor:
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1, 1).to(q)


def _polished(q: torch.Tensor) -> torch.Tensor:
    return 1.5 * q - 0.5 * q @ (q.t() @ q)
