"""Memory that goes back to the system."""

import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.models.memory.resident_memory import forget_pages, return_freed_memory

MEBI = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(kind: str) -> int:
    """Bytes of this process's resident memory of one kind: RssFile, RssAnon."""
    [line] = [s for s in pathlib.Path("/proc/self/status").read_text().splitlines() if s.startswith(kind)]
    return int(line.split()[1]) * 1024


def mapped(folder: pathlib.Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of 16 MiB, and the same values out of the map of a file."""
    values = torch.randn(4 * MEBI, generator=torch.Generator().manual_seed(0))
    save_file({"weight": values}, folder / "mapped.safetensors")
    return values, torch.UntypedStorage.from_file(
        str(folder / "mapped.safetensors"), shared=False, nbytes=(folder / "mapped.safetensors").stat().st_size
    )


@linux
def test_a_forgotten_tensor_is_no_longer_resident_and_reads_the_same_from_its_file(tmp_path: pathlib.Path) -> None:
    values, storage = mapped(tmp_path)
    offset = len(storage) - values.nbytes
    tensor = torch.empty(0, dtype=torch.float32).set_(storage, offset // 4, values.shape)
    assert tensor.equal(values)
    before = resident("RssFile")
    forget_pages(tensor)
    assert resident("RssFile") <= before - 15 * MEBI
    assert tensor.equal(values)


@linux
def test_a_tensor_in_memory_of_its_own_keeps_its_values_when_it_is_to_be_forgotten() -> None:
    values = torch.randn(4 * MEBI)
    copy = values.clone()
    forget_pages(copy)
    assert copy.equal(values)


@linux
def test_a_tensor_that_is_a_strided_part_of_a_map_keeps_its_values(tmp_path: pathlib.Path) -> None:
    values, _ = mapped(tmp_path)
    part = load_file(tmp_path / "mapped.safetensors")["weight"].view(2048, 2048)[:, ::2]
    forget_pages(part)
    assert part.equal(values.view(2048, 2048)[:, ::2])


def test_a_tensor_without_memory_is_left_alone() -> None:
    values = torch.arange(8.0)
    for nothing in (values[:0], values.to("meta")):
        forget_pages(nothing)
    assert values.equal(torch.arange(8.0))


@linux
def test_holes_of_the_heap_go_back_to_the_system() -> None:
    # Below the size that glibc maps by itself; every other one stays, so that the heap cannot shrink.
    pieces = [torch.ones(1 << 14) for _ in range(2048)]
    before = resident("RssAnon")
    del pieces[::2]
    return_freed_memory()
    assert resident("RssAnon") <= before - 40 * MEBI


_HOLES = """
import torch
from ptq.models.memory.resident_memory import map_large_tensors

def resident():
    [line] = [s for s in open("/proc/self/status") if s.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

map_large_tensors()
for _ in range(4):  # what glibc sees freed raises the size from which on it maps
    del_me = torch.ones(31 << 18)
    del del_me
before = resident()
pieces = [torch.ones(size << 18) for _ in range(24) for size in (8, 1)]
del pieces[::2]
print(resident() - before)
"""


@linux
def test_large_tensors_that_are_freed_leave_no_holes_in_the_heap() -> None:
    # As glibc is by itself 120 to 200 MiB stay, by chance.
    done = subprocess.run([sys.executable, "-c", _HOLES], check=True, capture_output=True, text=True)
    assert float(done.stdout) <= 24 + 8, "MiB: the small ones"
