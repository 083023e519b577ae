"""The basis of the residual stream: what hidden states are multiplied by once a transform has turned the stream as a whole."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Basis:
    """A change of the residual stream: ``h -> (h - mean(h)) @ matrix`` where `centred`, else ``h @ matrix``.

    Attributes:
        matrix: float64 (channels, channels).
        inverse: its inverse; the transpose for a rotation.
        centred: whether the mean over the channels of each token is taken out first: LayerNorms do not see it.
        first: full names of the norms before the first block, whose output is the stream: it is brought into the basis online.
    """

    matrix: torch.Tensor
    inverse: torch.Tensor
    centred: bool = False
    first: tuple[str, ...] = ()

    @classmethod
    def rotation(cls, matrix: torch.Tensor, centred: bool = False, first: tuple[str, ...] = ()) -> Self:
        """Returns the basis of an orthogonal `matrix`.

        Raises:
            ValueError: when it is not orthogonal to 1e-6.
        """
        wide = matrix.double()
        error = float((wide @ wide.t() - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max())
        if not error <= 1e-6:
            raise ValueError(f"matrix: differs from an orthogonal one by {error:.1e}: expected at most 1e-6")
        return cls(wide, wide.t(), centred, first)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden states (..., channels) of the old basis in the new one, in their own type."""
        if self.centred:
            hidden = hidden - hidden.mean(-1, keepdim=True)
        return _product(hidden, self.matrix)

    def back(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden states of the new basis in the old one; ``forward(back(h)) == h``. A mean that was taken out stays out."""
        return _product(hidden, self.inverse)


def _product(hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    # At least float32, and one conversion a call: the matrix is small beside the hidden states.
    wide = hidden.dtype if hidden.dtype in {torch.float32, torch.float64} else torch.float32
    return (hidden.to(wide) @ matrix.to(hidden.device, wide)).to(hidden.dtype)
