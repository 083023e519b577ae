"""How a model calls its blocks: recorded once, shared by batches that are called alike, moved to a block's device."""

from dataclasses import dataclass
from typing import Any

import torch

Moved = dict[tuple[int, torch.device], torch.Tensor]
"""Copies of recorded tensors on other devices, by the tensor's identity and device: masks and rotary embeddings repeat."""


@dataclass
class Call:
    """How the model called one block for one batch: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, device: torch.device, moved: Moved) -> "Call":
        """Returns the call with its tensors on `device`; `moved` has what was copied for other calls."""
        return Call(_on(self.args, device, moved), _on(self.kwargs, device, moved))


def shared(earlier: list[Call] | None, calls: list[Call]) -> list[Call]:
    """Lets `calls` hold the tensors of `earlier` where they are equal: masks and rotary embeddings repeat in every batch."""
    if earlier is None:
        return calls
    return [
        Call(_same(old.args, new.args), {key: _same(old.kwargs.get(key), value) for key, value in new.kwargs.items()})
        for old, new in zip(earlier, calls, strict=True)
    ]


def _same(old: Any, new: Any) -> Any:
    if isinstance(new, tuple) and isinstance(old, tuple) and len(old) == len(new):
        return tuple(_same(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        alike = old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
        return old if alike else new
    return new


def _on(value: Any, device: torch.device, moved: Moved) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        key = id(value), device
        if key not in moved:
            moved[key] = value.to(device)
        return moved[key]
    if type(value) in {tuple, list}:
        return type(value)(_on(item, device, moved) for item in value)
    if type(value) is dict:
        return {key: _on(item, device, moved) for key, item in value.items()}
    return value
