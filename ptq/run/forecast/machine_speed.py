"""How fast this machine is: products, GPTQ's loop over columns, and the disk, by a second's work."""

import functools
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ptq.files.scratch import scratch_path
from quantize.kernels.matmul import product
from quantize.solvers.gptq import GptqOptions, solve
from quantize.spec.quant_spec import QuantSpec

SIZE = 1024
"""Rows and columns of the matrices whose product is timed."""
COLUMNS = 128
PIECE = 32 << 20
"""Bytes that are written, and read again past the page cache where the system can be told to."""


@dataclass(frozen=True)
class MachineSpeed:
    """What one process does in a second.

    Attributes:
        products: floating-point operations of products in the arithmetic's type; a multiplication and an addition are two.
        columns: columns that GPTQ takes one after another, of a weight so small that its arithmetic takes no time.
        read: bytes read from the disk.
        written: bytes written to it.
    """

    products: float
    columns: float
    read: float
    written: float


def measured(device: torch.device, dtype: torch.dtype, folder: pathlib.Path) -> MachineSpeed:
    """Returns this machine's speed. It is measured once a process, of each disk once.

    Args:
        device: where the arithmetic happens.
        dtype: of the arithmetic.
        folder: on the disk that counts; it or one above it exists.
    """
    products, columns = _arithmetic(device, dtype)
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return MachineSpeed(products, columns, *_disk(_Disk(there.stat().st_dev, there)))


@functools.cache
def _arithmetic(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the operations of products and GPTQ's columns a second."""
    a, b = (torch.ones(SIZE, SIZE, dtype=dtype, device=device) for _ in range(2))
    spec, options = QuantSpec(bits=4), GptqOptions(block=COLUMNS)
    weight, hessian = torch.ones(8, COLUMNS, device=device), torch.eye(COLUMNS, device=device)
    seconds = _least(lambda: product(a, b), device)
    solving = _least(lambda: solve(weight, hessian, spec, options), device)
    return 2 * SIZE**3 / seconds, COLUMNS / solving


def _least(work: Callable[[], object], device: torch.device, times: int = 4) -> float:
    """Returns the least seconds of some calls after one that warms up."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return max(min(found[1:]), 1e-9)


@dataclass(frozen=True)
class _Disk:
    """A disk by its number, and a folder on it."""

    number: int
    folder: pathlib.Path = field(compare=False)


@functools.cache
def _disk(disk: _Disk) -> tuple[float, float]:
    """Returns the bytes a second that are read and written, of a file that goes again."""
    path, data = scratch_path(disk.folder, "speed"), os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(PIECE >> 20):
                file.write(data)
            os.fsync(file.fileno())
            written = time.perf_counter() - start
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(1 << 20)
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        read = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    return PIECE / max(read, 1e-9), PIECE / max(written, 1e-9)
