"""Rotary embeddings undone and done again: what a cache needs that holds keys as they are before them."""

from dataclasses import dataclass

import torch


def _halves(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _spread(table: torch.Tensor) -> torch.Tensor:
    return table.chunk(2, -1)[0].repeat_interleave(2, -1)


LAYOUTS = {
    "halves": (_halves, lambda table: table),
    "pairs": (_pairs, lambda table: table),
    "pairs of half a table": (_pairs, _spread),
}
"""Which channels turn together, i with i + d / 2 or 2 i with 2 i + 1, and what a model makes of its tables for that."""


@dataclass(frozen=True)
class Rotary:
    """The rotary embeddings of some tokens: tables `cos` and `sin` (1 or batch, tokens, channels), and a layout of `LAYOUTS`.

    Channels beyond those of the tables do not turn.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    layout: str

    def undo(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Returns the states `x` (batch, heads, tokens, channels) of the given tokens as they were before the embeddings."""
        return self._turn(x, tokens, -1)

    def do(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Returns the states with the embeddings."""
        return self._turn(x, tokens, 1)

    def _turn(self, x: torch.Tensor, tokens: slice, sign: int) -> torch.Tensor:
        turn, table = LAYOUTS[self.layout]
        cos, sin = (table(t[:, tokens].float()).unsqueeze(1) for t in (self.cos, self.sin))
        width = cos.shape[-1]
        moving = x[..., :width].float() if x.dtype != torch.float64 else x[..., :width]
        turned = moving * cos + sign * turn(moving) * sin
        if sign < 0:
            # Tables may be scaled (YaRN): then they are no rotation.
            turned = turned / (cos.square() + sin.square())
        return torch.cat([turned.to(x.dtype), x[..., width:]], -1)


def layout_of(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Returns the layout of the embeddings of `keys` (1, heads, tokens, channels), which without them are the same at every
    position, or None where no layout makes them so.
    """
    for layout in LAYOUTS:
        if cos.shape[-1] % 2 or cos.shape[-1] > keys.shape[-1]:
            return None
        bare = Rotary(cos, sin, layout).undo(keys, slice(None)).float()
        apart = (bare - bare[:, :, :1]).abs().amax()
        if apart <= 1e-3 * bare.abs().amax() * max(1.0, torch.finfo(keys.dtype).eps / 1e-4):
            return layout
    return None
