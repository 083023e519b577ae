"""Tensors that a thread reads while the arithmetic goes on, and copies to the device without waiting for it."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ptq.errors import UserError


def waiting_type(stored: torch.dtype, rounding: torch.dtype, arithmetic: torch.dtype) -> torch.dtype:
    """Returns the type in which a tensor waits until it is used: `rounding` where `arithmetic` follows from it exactly, which in
    16 bits takes half the memory of float32, and half the way to a device; else `arithmetic`.

    Args:
        stored: the file's.
        rounding: what floating point is rounded to.
        arithmetic: what it is computed with.
    """
    # A resident model goes through the arithmetic type first: from float32 the same values come out, rounded once, unless the
    # file has more than 32 bits.
    narrow = arithmetic == torch.float32 and stored.is_floating_point and stored.itemsize <= arithmetic.itemsize
    return rounding if narrow else arithmetic


def widened(tensors: dict[str, torch.Tensor], arithmetic: torch.dtype) -> Callable[[str], torch.Tensor]:
    """Returns a function that takes a tensor out of `tensors` by its name and gives it as `arithmetic`; integers stay.

    What several names share is shared after it too; all else is freed as it is taken.
    """
    count = Counter(map(id, tensors.values()))
    shared = {id(t): (t, t.to(arithmetic)) for t in tensors.values() if count[id(t)] > 1 and t.is_floating_point()}

    def take(name: str) -> torch.Tensor:
        tensor = tensors.pop(name)
        if id(tensor) in shared:
            return shared[id(tensor)][1]
        return tensor.to(arithmetic) if tensor.is_floating_point() else tensor

    return take


class ReadAhead:
    """Reads tensors of these names in a thread, from the moment that it is made.

    On CUDA they are read into pinned memory and copied by a stream of their own, so that neither the disk nor the copy holds up
    what the device computes.

    Args:
        names: of the tensors, in the order in which they are read.
        read: gives the tensor of a name on a device; called in the thread only.
        device: where they are to be.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str, torch.device], torch.Tensor], device: torch.device):
        self.names, self._read, self._device = tuple(names), read, device
        self._tensors: dict[str, torch.Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by name when all are there. Where one could not be read, those before it: whoever reads it then
        sees why.
        """
        self._thread.join()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in self._tensors.values():
                tensor.record_stream(current)
        found, self._tensors = self._tensors, {}
        return found

    def _work(self) -> None:
        for name in self.names:
            try:
                self._tensors[name] = self._tensor(name)
            except (UserError, RuntimeError, MemoryError):
                return

    def _tensor(self, name: str) -> torch.Tensor:
        if self._stream is None:
            return self._read(name, self._device)
        pinned = self._read(name, torch.device("cpu")).pin_memory()
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True)
