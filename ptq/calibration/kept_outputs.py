"""What Linears gave on the way forward, kept for the way backward, which then need not multiply again."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import nn

from ptq.models.memory.memory_limits import free_memory
from ptq.network.block_stream import Flow
from ptq.network.network import weight_of

SHARE = 0.5
"""Of the memory that is free, how much may be kept."""


def room_on(device: torch.device) -> int:
    """Returns the bytes that may be kept on `device`; a GPU multiplies again sooner than it fetches."""
    return int(SHARE * free_memory(device)) if device.type == "cpu" else 0


class KeptOutputs:
    """Outputs by Linear, in the order of the calls, of as many blocks as there is room for.

    Args:
        room: bytes.
    """

    def __init__(self, room: int):
        self._room = room
        self._buffers: dict[str, torch.Tensor] = {}
        self._held: dict[str, deque[torch.Tensor]] = {}

    def open(self, modules: Mapping[str, nn.Module], flow: Flow) -> bool:
        """Returns whether the outputs of a block's Linears are kept, of all samples or none; counts them, taking each token to reach each Linear."""
        wanted = {name: flow.ids.numel() * weight_of(module).shape[0] for name, module in modules.items()}
        taken = sum(wanted.values()) * flow.hidden.element_size()
        if taken > self._room:
            return False
        self._room -= taken
        self._buffers = {name: torch.empty(numbers, dtype=flow.hidden.dtype) for name, numbers in wanted.items()}
        self._held |= {name: deque() for name in modules}
        return True

    def keep(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """Keeps a copy of what a Linear of the block that was opened last gave in this call, and returns it."""
        buffer = self._buffers[name]
        if y.numel() > len(buffer) or y.dtype != buffer.dtype:
            self._held[name].append(y.clone())
            return y
        self._held[name].append(buffer[: y.numel()].view(y.shape).copy_(y))
        self._buffers[name] = buffer[y.numel() :]
        return y

    def take(self, name: str) -> torch.Tensor | None:
        """Returns what the Linear gave in its next call, once; None where it was not kept."""
        held = self._held.get(name)
        return held.popleft() if held else None
