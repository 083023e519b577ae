"""Weights rounded to the baseline's type a few numbers at a time, so that no tensor is in memory a second time."""

import torch

PIECE = 1 << 19
"""Numbers that are looked at together."""


def beyond(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a value of a floating point tensor is beyond the range of `dtype`."""
    most = torch.finfo(dtype).max
    return any(bool((p.abs() > most).any()) for p in _pieces(tensor))


@torch.no_grad()
def round_in_place(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Rounds a floating point tensor to what `dtype` can hold; its own type stays."""
    if tensor.dtype != dtype:
        for piece in _pieces(tensor):
            piece.copy_(piece.to(dtype))


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns views of all the tensor's values; of one that is not contiguous, of some rows each."""
    if tensor.is_contiguous():
        return tensor.view(-1).split(PIECE)
    return tensor.split(max(1, PIECE // max(1, tensor[0].numel())))
