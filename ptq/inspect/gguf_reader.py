"""What a GGUF file holds, read with bounds: no length in it is believed before the file is known to be that long."""

import mmap
import pathlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ptq.errors import UserError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
SHOWN = 60
"""Characters of a text that are kept."""
MOST_DIMENSIONS = 4
HALF_STEP_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Formats whose block begins with its step as fp16, by bytes a block."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape (slowest dimension first), type, and place in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata (arrays as their length and kind, long texts cut) and tensors."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    def greatest_error(self, tensor: GgufTensor) -> float | None:
        """Returns half of the tensor's greatest step, None where its type has none that is known here."""
        size = HALF_STEP_BYTES.get(tensor.type)
        if size is None or not tensor.bytes:
            return None
        blocks = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.bytes // size, size))
        steps = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        if not np.isfinite(steps).all():
            raise UserError(f"{self.path}: damaged: {tensor.name} holds a scale that is NaN or inf: export it again")
        return float(np.abs(steps).max()) / 2


class _Cursor:
    """A position in the file's bytes that cannot leave them."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes. Raises `ValueError` beyond the end, before anything is allocated."""
        self.skip(size)
        return self.data[self.position - size : self.position]

    def skip(self, size: int) -> None:
        """Moves on. Raises `ValueError` beyond the end."""
        if size < 0 or size > len(self.data) - self.position:
            raise ValueError(f"{size} bytes are promised at {self.position}, the file has {len(self.data)}")
        self.position += size

    def number(self, form: str) -> Any:
        """Returns one number of the `struct` form."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int | None = None) -> str:
        """Returns a string, of a longer one than `most` bytes the beginning."""
        length = self.number("<Q")
        start = self.position
        self.skip(length)
        kept = length if most is None else min(length, most)
        return self.data[start : start + kept].decode("utf-8", errors="replace")


def read_gguf(path: pathlib.Path) -> GgufFile:
    """Reads the header of a GGUF file and proves that every tensor lies inside it.

    Raises:
        UserError: one line, for a file that is truncated or damaged, or of another version than 2 or 3.
    """
    if path.stat().st_size < 24:
        raise UserError(f"{path}: truncated: {path.stat().st_size} bytes, a GGUF header has 24: export it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, _Cursor(data))
        except (ValueError, struct.error, KeyError, OverflowError) as error:
            raise UserError(f"{path}: truncated or damaged ({error}): export it again") from None


def _parse(path: pathlib.Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise ValueError("its first bytes are not GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    count, entries = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {"version": version}
    for _ in range(entries):
        key = cursor.text()
        metadata[key] = _value(cursor, cursor.number("<I"))
    found = [_tensor(cursor) for _ in _bounded(count, cursor, 24)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(GgufTensor(t.name, t.shape, t.type, start + t.offset, t.bytes) for t in found)
    end = max((t.offset + t.bytes for t in tensors), default=0)
    if end > len(cursor.data):
        raise ValueError(f"its header promises {end} bytes, the file has {len(cursor.data)}")
    return GgufFile(path, metadata, tensors)


def _bounded(count: int, cursor: _Cursor, least: int) -> range:
    """Returns range(count); ValueError when so many items of at least `least` bytes cannot be left in the file."""
    if count * least > len(cursor.data) - cursor.position:
        raise ValueError(f"{count} items are promised, more than the file can hold")
    return range(count)


def _tensor(cursor: _Cursor) -> GgufTensor:
    name, dimensions = cursor.text(), cursor.number("<I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = GGMLQuantizationType(cursor.number("<I")), cursor.number("<Q")
    block, size = GGML_QUANT_SIZES[kind]
    values = 1
    for extent in shape:
        values *= extent
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} values in blocks of {block}")
    return GgufTensor(name, shape, kind.name, offset, values // block * size)


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == STRING:
        return cursor.text(SHOWN * 4)[:SHOWN]
    if kind != ARRAY:
        raise ValueError(f"a value of type {kind}")
    inner, length = cursor.number("<I"), cursor.number("<Q")
    if inner in SCALARS:
        cursor.skip(length * struct.calcsize(SCALARS[inner]))
    elif inner == STRING:
        for _ in _bounded(length, cursor, 8):
            cursor.skip(cursor.number("<Q"))
    else:
        raise ValueError(f"an array of type {inner}")
    return f"{length} values"
