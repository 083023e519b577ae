"""The online Hadamard transform as a module: of what a Linear reads, of what a norm writes, of each head's query and key."""

from typing import Any, Self

import torch
from torch import nn

from quantize.transforms.hadamard import hadamard_transform, random_signs


class OnlineHadamard(nn.Module):
    """Multiplies (..., width) by ``diag(signs) H``, orthonormal, in O(width log width).

    Args:
        width: channels.
        seed: of random signs; None for none.
        block: channels of a block that is transformed on its own; None for all.
    """

    def __init__(self, width: int, seed: int | None = None, block: int | None = None):
        super().__init__()
        self.width, self.seed, self.block = width, seed, block
        self.register_buffer("signs", None if seed is None else random_signs(width, seed), persistent=False)

    signs: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x Q`` in the type of `x`."""
        return hadamard_transform(x, self.signs, self.block)

    def description(self) -> dict[str, Any]:
        """Returns what `from_description` builds the module from again, as JSON holds it."""
        return {"width": self.width, "seed": self.seed, "block": self.block}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """Returns the module that gave this `description`."""
        return cls(**description)

    def extra_repr(self) -> str:
        """Names the width."""
        return f"width={self.width}, seed={self.seed}, block={self.block}"


class TurnedNorm(nn.Module):
    """Gives what a norm gives, turned online: its gain comes after its own division, so no weight can take the turn.

    Args:
        norm: the norm.
        online: what acts on its output (..., width).
        centred: whether the mean over the channels of each token is taken out first.
    """

    def __init__(self, norm: nn.Module, online: OnlineHadamard, centred: bool):
        super().__init__()
        self.norm, self.online, self.centred = norm, online, centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the turned output for `x` (..., width), in its type."""
        y: torch.Tensor = self.norm(x)
        turned: torch.Tensor = self.online(y - y.mean(-1, keepdim=True) if self.centred else y)
        return turned
