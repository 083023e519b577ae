"""Online linear maps of what a Linear reads: one matrix for each block of channels, or a Kronecker product behind a diagonal.

Both hold what is stored of them, rounded to 16-bit floats where they are made, so that the inverse that goes into the
weights is that of the numbers which act.
"""

from typing import Any, Self

import torch
from torch import nn

from quantize.transforms.kronecker import kronecker_apply, kronecker_inverse
from quantize.transforms.wush import block_apply

STORED = torch.float16
"""Type that a map is stored in; it is computed with in float32."""


class OnlineBlocks(nn.Module):
    """Multiplies each block of consecutive channels by a matrix of its own.

    Args:
        matrices: invertible (blocks, size, size); rounded to 16 bits here.

    Raises:
        ValueError: for matrices that are not square, or not finite in 16 bits.
    """

    matrices: torch.Tensor

    def __init__(self, matrices: torch.Tensor):
        super().__init__()
        if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
            raise ValueError(f"matrices: shape {tuple(matrices.shape)} is not valid: expected (blocks, size, size)")
        self.register_buffer("matrices", _stored("matrices", matrices))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` (..., blocks * size) times the matrices, in its type."""
        return block_apply(x, self.matrices)

    def inverse_weight(self, weight: torch.Tensor, wide: torch.dtype = torch.float64) -> torch.Tensor:
        """Returns the weight (out, in) that gives for the mapped input what `weight` gave for the plain one, in its type.

        Computed in the type `wide`: in float32 it is good for an estimate.

        Raises:
            ValueError: for a matrix that is singular.
        """
        # Y A^T = W, a block of columns at a time: no inverse is formed.
        blocks = weight.to(wide).reshape(len(weight), *self.matrices.shape[:2]).permute(1, 2, 0)
        try:
            solved = torch.linalg.solve(self.matrices.to(wide), blocks)
        except torch.linalg.LinAlgError:
            raise ValueError("matrices: one is singular: expected invertible ones") from None
        return solved.permute(2, 0, 1).reshape(weight.shape).to(weight.dtype)

    def folded(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight (out, in) that gives for the plain input what `weight` gives for the mapped one, in its type."""
        return block_apply(weight.double(), self.matrices.mT).to(weight.dtype)

    def description(self) -> dict[str, Any]:
        """Returns what `from_description` builds the module from again, but for its tensors."""
        return {"blocks": self.matrices.shape[0], "size": self.matrices.shape[1]}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """Returns a module of that shape; its tensor is to be read."""
        size = description["size"]
        return cls(torch.eye(size).repeat(description["blocks"], 1, 1))

    def extra_repr(self) -> str:
        """Names the shape."""
        return f"blocks={self.matrices.shape[0]}, size={self.matrices.shape[1]}"


class OnlineKronecker(nn.Module):
    """Divides by a diagonal, then multiplies by a Kronecker product: ``(x / d) (P1 x P2)`` (FlatQuant, section 3.1).

    Args:
        left: P1, invertible (a, a).
        right: P2, invertible (b, b).
        diagonal: d (a * b,), none of it 0. All three are rounded to 16 bits here.

    Raises:
        ValueError: for shapes that do not match, or values that are 0 in the diagonal, or not finite, in 16 bits.
    """

    left: torch.Tensor
    right: torch.Tensor
    diagonal: torch.Tensor

    def __init__(self, left: torch.Tensor, right: torch.Tensor, diagonal: torch.Tensor):
        super().__init__()
        if diagonal.shape != (len(left) * len(right),):
            raise ValueError(
                f"diagonal: shape {tuple(diagonal.shape)} is not valid: expected ({len(left) * len(right)},)"
            )
        for name, tensor in (("left", left), ("right", right), ("diagonal", diagonal)):
            self.register_buffer(name, _stored(name, tensor))
        if bool((self.diagonal == 0).any()):
            raise ValueError("diagonal: holds a 0 in 16 bits: expected finite divisors")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the mapped `x` (..., a * b), in its type."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        left, right, diagonal = (t.to(wide) for t in (self.left, self.right, self.diagonal))
        return kronecker_apply(x.to(wide) / diagonal, left, right).to(x.dtype)

    def inverse_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight (out, in) that gives for the mapped input what `weight` gave for the plain one, in its type.

        Raises:
            ValueError: for a factor that is singular.
        """
        left, right = kronecker_inverse(self.left.double(), self.right.double())
        return kronecker_apply(weight.double() * self.diagonal.double(), left.t(), right.t()).to(weight.dtype)

    def folded(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight (out, in) that gives for the plain input what `weight` gives for the mapped one, in its type."""
        left, right = self.left.double().t(), self.right.double().t()
        return (kronecker_apply(weight.double(), left, right) / self.diagonal.double()).to(weight.dtype)

    def description(self) -> dict[str, Any]:
        """Returns what `from_description` builds the module from again, but for its tensors."""
        return {"left": len(self.left), "right": len(self.right)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """Returns a module of that shape; its tensors are to be read."""
        a, b = description["left"], description["right"]
        return cls(torch.eye(a), torch.eye(b), torch.ones(a * b))

    def extra_repr(self) -> str:
        """Names the factors."""
        return f"left={len(self.left)}, right={len(self.right)}"


def _stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the float32 numbers that 16 bits hold of `tensor`."""
    rounded = tensor.detach().to(STORED).float()
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"{name}: holds NaN or inf, or numbers beyond 16-bit floats: expected finite ones")
    return rounded
