"""What Linears gave on the way forward, kept for the way backward, which then need not multiply again."""

from collections import deque
from collections.abc import Mapping

import psutil
import torch
from torch import nn

from ptq.network.block_stream import Flow
from ptq.network.network import Block, weight_of

SHARE = 0.5
"""Of the memory that is free, how much may be kept."""


def free_memory(device: torch.device) -> int:
    """Returns the bytes that may be kept on `device`; what leaves a GPU is slower to fetch than to compute."""
    return int(SHARE * psutil.virtual_memory().available) if device.type == "cpu" else 0


class KeptOutputs:
    """Outputs by Linear, in the order of the calls, of as many blocks as there is room for.

    Args:
        room: bytes.
    """

    def __init__(self, room: int):
        self._room = room
        self._held: dict[str, deque[tuple[torch.Tensor, int]]] = {}

    def open(self, block: Block, modules: Mapping[str, nn.Module], flow: Flow) -> bool:
        """Returns whether the outputs of a block are kept, of all samples or none; counts them, taking each token to reach each Linear."""
        width = sum(weight_of(module).shape[0] for module in modules.values())
        taken = flow.ids.numel() * width * flow.hidden.element_size()
        if taken > self._room:
            return False
        self._room -= taken
        self._held |= {name: deque() for name in modules}
        return True

    def keep(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """Keeps what a Linear gave in this call, and returns it."""
        self._held[name].append((y, y._version))
        return y

    def take(self, name: str) -> torch.Tensor | None:
        """Returns what the Linear gave in its next call, once; None where it was not kept, or was written into since."""
        held = self._held.get(name)
        if not held:
            return None
        y, version = held.popleft()
        return y if y._version == version else None
