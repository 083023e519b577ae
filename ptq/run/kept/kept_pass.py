"""What a pass through the blocks keeps on disk, so that a killed run goes on after the last finished block with the same bits."""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from ptq.files.atomic import linked, write_atomic, write_text
from ptq.files.bounded import parse_json
from ptq.network.block_stream import Flow
from ptq.network.network import Block
from ptq.ranks.world import ALONE, World, led

PROGRESS = "progress.json"
RESUME = "resume"
"""Folder inside a run's folder that holds what is kept until the run has ended."""
WORST_SHARE = 0.05
"""Share of a pass's time that keeping may take before every second block only is kept: a kill costs one finished block at most."""


class Resumable(Protocol):
    """A visitor whose work on a finished block can be written, and taken up again."""

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes what it has of the finished block into a file."""

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up what `write` has written."""


class KeptPass:
    """The finished blocks of one pass: a file each, and the hidden states after the last one.

    Hidden states are written as they are, without waiting for the disk: their sums tell after a crash whether they came
    there. What is named in ``progress.json`` is used only when all of it is whole.

    Args:
        folder: of this pass alone; made when the first block is kept.
        key: a digest of everything that the results depend on; what was kept under another one is thrown away.
        flows: whose hidden states pass.
        visitor: what works on the blocks.
        say: told in a sentence what is taken up or thrown away.
        world: of its ranks one writes; all of them take up what it finds, from one file system.
        sum_of: gives, by the file of a finished block, a sum over all bytes that were kept of it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        key: str,
        flows: Sequence[Flow],
        visitor: Resumable,
        say: Callable[[str], None] = lambda line: None,
        world: World = ALONE,
        sum_of: Callable[[pathlib.Path], int] | None = None,
    ):
        self.folder, self.flows, self.visitor, self.say, self.world = folder, list(flows), visitor, say, world
        self.key, self._sum_of = key, sum_of or sum_of_file
        self._sums: list[int] = []
        self._last: dict[str, Any] | None = None
        self._total = 0
        self._borrowed = False
        self._slot, self._spent, self._since = 0, 0.0, time.perf_counter()

    def take_up(self, blocks: Sequence[Block]) -> int:
        """Puts back what was kept; returns how many blocks are done."""
        self._since, self._total = time.perf_counter(), len(blocks)
        entry = led(self.world, lambda: next((e for e in self._entries() if self._whole(e)), None))
        if entry is None:
            self.drop()
            return 0
        done, self._slot = int(entry["blocks"]), 1 - int(entry["slot"])
        for i, flow in enumerate(self.flows):
            _read_into(flow.hidden, self._hidden(int(entry["slot"]), i))
        for block in blocks[:done]:
            self.visitor.read(block, self.file_of(block))
        self._sums, self._last = list(entry["block_sums"]), entry
        whence = "another run's finished blocks, this one goes on" if self._borrowed else "resumed"
        self.say(f"{whence} after block {done} of {len(blocks)}")
        return done

    def keep(self, block: Block) -> None:
        """Writes the finished block and the hidden states after it."""
        if not self.world.leads:
            return
        start = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.file_of(block)
        self.visitor.write(block, path)
        self._sums.append(self._sum_of(path))
        # A pass that is quicker than its writing would mostly write; two blocks in a row are never left out.
        left_out = block.index != (0 if self._last is None else self._last["blocks"])
        if left_out or self._spent <= WORST_SHARE * (start - self._since):
            sums = [_write_tensor(flow.hidden, self._hidden(self._slot, i)) for i, flow in enumerate(self.flows)]
            entry = {
                "blocks": block.index + 1,
                "of": self._total,
                "slot": self._slot,
                "hidden_sums": sums,
                "block_sums": list(self._sums),
            }
            entries = [entry] if self._last is None else [entry, self._last]
            write_text(self.folder / PROGRESS, json.dumps({"key": self.key, "entries": entries}))
            self._last, self._slot = entry, 1 - self._slot
        self._spent += time.perf_counter() - start

    def hand_over(self, blocks: Sequence[Block], folder: pathlib.Path) -> None:
        """Puts the files of the finished blocks into another folder as well, without a second copy where the file system can."""
        for block in blocks if self.world.leads else ():
            source = self.file_of(block)
            write_atomic(folder / source.name, partial(linked, source))

    @property
    def begun(self) -> bool:
        """Whether a block of this pass is kept."""
        return self._last is not None

    def lend(self, folder: pathlib.Path) -> None:
        """Puts what is kept of the pass into `folder`, for `borrow`."""
        if self._last is None:
            raise ValueError("a pass that keeps no block has none to lend")
        for i in range(self._last["blocks"]):
            linked(self._file(i), folder / self._file(i).name)
        self._copy_hidden(self._last, self.folder, folder)
        write_text(folder / PROGRESS, json.dumps({"entries": [self._last]}))

    def borrow(self, folder: pathlib.Path) -> None:
        """Goes on after the blocks that the same pass of another run has put into `folder`, when the pass runs."""
        [entry] = parse_json((folder / PROGRESS).read_text(encoding="utf-8"))["entries"]
        self.drop()
        self.folder.mkdir(parents=True, exist_ok=True)
        for i in range(entry["blocks"]):
            linked(folder / self._file(i).name, self._file(i))
        # Later blocks of this pass write over them: no second name of the same bytes, as the blocks' files may have.
        self._copy_hidden(entry, folder, self.folder)
        write_text(self.folder / PROGRESS, json.dumps({"key": self.key, "entries": [entry]}))
        self._borrowed = True

    def _copy_hidden(self, entry: Mapping[str, Any], source: pathlib.Path, target: pathlib.Path) -> None:
        for i in range(len(self.flows)):
            name = self._hidden(int(entry["slot"]), i).name
            shutil.copyfile(source / name, target / name)

    def drop(self) -> None:
        """Removes everything that was kept."""
        if self.world.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._sums, self._last = [], None

    def file_of(self, block: Block) -> pathlib.Path:
        """Returns the file of a finished block."""
        return self._file(block.index)

    def _file(self, number: int) -> pathlib.Path:
        return self.folder / f"block-{number:05d}.safetensors"

    def _hidden(self, slot: int, flow: int) -> pathlib.Path:
        return self.folder / f"hidden-{slot}-{flow}.bin"

    def _entries(self) -> list[dict[str, Any]]:
        try:
            found = parse_json((self.folder / PROGRESS).read_text(encoding="utf-8"))
            if found["key"] != self.key:
                self.say("what an interrupted run left was made from other weights, data, options or code: done again")
                return []
            return list(found["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _whole(self, entry: Mapping[str, Any]) -> bool:
        try:
            done, sums = int(entry["blocks"]), entry["hidden_sums"]
            files = [self._file(i) for i in range(done)]
            return (
                len(sums) == len(self.flows)
                and all(sum_of_file(self._hidden(int(entry["slot"]), i)) == s for i, s in enumerate(sums))
                and all(self._sum_of(file) == s for file, s in zip(files, entry["block_sums"], strict=True))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _sum(data: torch.Tensor) -> int:
    """Returns a sum of the bytes (n,) in which every page counts differently: a page that is missing or misplaced shows."""
    words = data[: len(data) // 8 * 8].view(torch.int64)
    pages = words[: len(words) // 512 * 512].view(-1, 512)
    weighed = (
        (pages.sum(1) * (2 * torch.arange(len(pages)) + 1)).sum() if len(pages) else torch.zeros((), dtype=torch.int64)
    )
    rest = words[len(pages) * 512 :].sum() + data[len(words) * 8 :].sum() + len(data)
    return int(weighed + rest)


def sum_of_file(path: pathlib.Path, start: int = 0, end: int | None = None) -> int:
    """Returns `_sum` of the file's bytes from `start` to `end`. ValueError where it ends before that."""
    end = path.stat().st_size if end is None else end
    if end == start:
        return 0
    if path.stat().st_size < end:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: expected {end}")
    # Copy on write, which nobody does: torch knows no tensor that is not to be written.
    return _sum(torch.from_numpy(np.memmap(path, np.uint8, "c", start, (end - start,))))


def _write_tensor(tensor: torch.Tensor, path: pathlib.Path) -> int:
    data = _bytes_of(tensor.cpu())
    with path.open("wb", buffering=0) as file:
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        while len(view):
            view = view[file.write(view) :]
    return _sum(data)


def _read_into(tensor: torch.Tensor, path: pathlib.Path) -> None:
    """Fills `tensor` with what `_write_tensor` wrote. ValueError when the file has another size."""
    size = tensor.numel() * tensor.element_size()
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: expected {size}")
    kept = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    tensor.copy_(kept)
