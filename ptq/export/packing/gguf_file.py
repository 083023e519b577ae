"""A GGUF file that is written a block at a time: the size of its header is known before any value is, so each block has its place."""

import dataclasses
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gguf
import numpy as np

from ptq.export.base import Exported
from ptq.export.packing.gguf_architectures import ARCHITECTURES
from ptq.export.packing.gguf_metadata import add_sizes, add_tokenizer, copy_tokenizer
from ptq.export.packing.gguf_tensors import Entry, FileTensors, TensorInfo
from ptq.export.quantized_tensors import QuantizedTensors
from ptq.files.atomic import linked, write_atomic, writing_failed
from ptq.network.network import Block

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "F32": 0}
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Part:
    """Tensors that lie behind one another in the file, from `start` to `end` (bytes from the file's begin).

    Attributes:
        start: where the first one begins.
        end: where the next part begins.
        tensors: what the header will say of them.
        moved: how far rounding scales to fp16 moved a weight at most.
    """

    start: int
    end: int
    tensors: tuple[TensorInfo, ...]
    moved: float


class GgufFile:
    """Writes a model's file: its blocks in order, each when it is there; what lies outside them, and the header, at the end.

    Args:
        source: the model. What comes before its blocks is read here, for the size that it will have in the file.
        pre: llama.cpp's name of the pre-tokenizer, or None to tell it by its pattern.
    """

    def __init__(self, source: QuantizedTensors, pre: str | None):
        self._source, self._pre, self._tensors = source, pre, FileTensors(source)
        # Numbers of a header have one width each: these are not the file's, and take as many bytes.
        unknown = [TensorInfo(entry.name, (1,) * entry.dims, 4, "F32") for entry in self._tensors]
        self._data = _aligned(len(self._header(unknown)))
        self._first = self._data + sum(_aligned(self._tensors.made(e).info.bytes) for e in self._tensors.before)
        self._parts: dict[int, Part] = {}

    def append(self, block: Block, file: pathlib.Path) -> dict[str, Any]:
        """Writes the block's tensors behind those of the block before it."""
        start = self._first if block.index == 0 else self._parts[block.index - 1].end
        self._parts[block.index] = part = self._written(self._tensors.blocks[block.name], file, start)
        return {"block": block.index, **dataclasses.asdict(part)}

    def take_up(self, part: Mapping[str, Any]) -> None:
        """Takes a block for written."""
        tensors = tuple(TensorInfo.of(tensor) for tensor in part["tensors"])
        self._parts[int(part["block"])] = Part(int(part["start"]), int(part["end"]), tensors, float(part["moved"]))

    def complete(self, file: pathlib.Path) -> None:
        """Writes what lies outside the blocks, and the header. All blocks have been written.

        Raises:
            ValueError: for a block that has not.
        """
        blocks = [self._parts.get(block.index) for block in self._source.network.blocks]
        there = [part for part in blocks if part is not None]
        if len(there) < len(blocks):
            raise ValueError(f"{len(there)} of {len(blocks)} blocks are in {file}")
        before = self._written(self._tensors.before, file, self._data)
        after = self._written(self._tensors.after, file, there[-1].end if there else self._first)
        parts = [before, *there, after]
        header = self._header([tensor for part in parts for tensor in part.tensors])
        if before.end != self._first or _aligned(len(header)) != self._data:
            raise ValueError(f"the header of {file} or what precedes its blocks has another size than it was given")
        with _opened(file) as handle:
            _put(handle, 0, header)
            os.truncate(handle.fileno(), after.end)
        self._moved = max(part.moved for part in parts)

    def finish(self, path: pathlib.Path, file: pathlib.Path) -> Exported:
        """Completes the file, and gives it the name `path` as well, without a second copy where the file system can."""
        try:
            self.complete(file)
        except OSError as error:
            raise writing_failed(path, error) from None
        write_atomic(path, partial(linked, file))
        return self.exported(path)

    def exported(self, path: pathlib.Path) -> Exported:
        """Returns what is said of the completed file, which lies at `path`."""
        notes = []
        if self._moved > 0:
            notes.append(
                f"scales were rounded to fp16: weights moved by at most {self._moved:.3g}; "
                "a run with export=gguf computes with such scales"
            )
        return Exported(path, path.stat().st_size, tuple(notes))

    def _written(self, entries: Sequence[Entry], file: pathlib.Path, start: int) -> Part:
        """Writes tensors from `start` on, one in memory at a time."""
        infos, moved, end = [], 0.0, start
        with _opened(file) as handle:
            for entry in entries:
                made = self._tensors.made(entry)
                values = made.values.astype(made.values.dtype.newbyteorder("<"), copy=False)
                _put(handle, end, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
                end = _aligned(end + made.info.bytes)
                infos.append(made.info)
                moved = max(moved, made.moved)
        return Part(start, end, tuple(infos), moved)

    def _header(self, tensors: Sequence[TensorInfo]) -> bytes:
        """Returns what precedes the data of `tensors`, in the file's order."""
        model, origin = self._source.network.model, self._source.origin
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "header"
            number = ARCHITECTURES[model.config.model_type].number
            writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[number])
            rows = model.get_input_embeddings().num_embeddings
            add_sizes(writer, model.config, type(model).__name__, rows)
            if origin is not None:
                copy_tokenizer(writer, origin)
            else:
                add_tokenizer(writer, self._source.tokenizer, rows, self._pre)
            for t in tensors:
                dtype = np.dtype(np.uint8 if t.in_blocks else np.float32)
                writer.add_tensor_info(t.name, t.shape, dtype, t.bytes, gguf.GGMLQuantizationType[t.type])
            matrices = Counter(t.type for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1)
            writer.add_file_type(FILE_TYPES[matrices.most_common(1)[0][0]])
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return path.read_bytes()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _opened(file: pathlib.Path) -> Any:
    """Returns the file, made where it is not there, to be written at any place of it."""
    return open(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)


def _put(handle: Any, place: int, data: bytes | memoryview) -> None:
    handle.seek(place)
    view = memoryview(data)
    while len(view):
        view = view[handle.write(view) :]
