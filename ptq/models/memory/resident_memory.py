"""What this process keeps resident, on Linux with glibc; elsewhere nothing happens here."""

import contextlib
import ctypes
import mmap
import pathlib
from typing import Any

import torch


def return_freed_memory() -> None:
    """Has glibc give the pages of freed tensors back to the system.

    Its heap keeps what is freed below 32 MiB, in holes that the next block's tensors fit only in part: without this, an
    OPT-1.3B shape offloaded grows by a quarter of a GiB from block to block.
    """
    _glibc("malloc_trim", 0)


MAPPED = 4 << 20
"""Bytes from which on a tensor has a map of its own: a weight has, most activations have not, and their pages need not be made anew."""
_M_MMAP_THRESHOLD = -3
"""`mallopt`'s number of the size from which on glibc maps what is asked for."""


def map_large_tensors() -> None:
    """Has glibc map each tensor of `MAPPED` bytes or more by itself, for the rest of the process: freed, its pages go back at once.

    By default glibc raises that size to 32 MiB with what it sees freed. Weights that one thread reads and another frees then leave holes
    in the heaps of both, by chance more or fewer: docs/results.md has the peaks of the same offloaded run with and without.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, MAPPED)


def forget_pages(tensor: torch.Tensor) -> None:
    """Takes a tensor that lies in a mapped file out of resident memory; read again, it comes from the file again.

    Only for a tensor that nobody has written to: what was written into the map is lost. A tensor that lies elsewhere, in
    memory of its own or on another device, is left as it is.
    """
    if tensor.device.type != "cpu" or not tensor.nbytes:
        return
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if first < last and tensor.is_contiguous() and _in_mapped_file(first, last):
        _glibc("madvise", ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED))


def _glibc(function: str, *arguments: Any) -> None:
    """Calls a function of glibc, where it is there."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def _in_mapped_file(first: int, last: int) -> bool:
    """Whether one private map of a file holds every address from `first` to before `last`."""
    maps = pathlib.Path("/proc/self/maps")
    if not maps.is_file():
        return False
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, modes, _, _, inode, *_ = line.split(maxsplit=5)
        low, high = (int(a, 16) for a in addresses.split("-"))
        if low <= first < high:
            return last <= high and modes.endswith("p") and inode != "0"
    return False
