"""GGUF files: whether one is whole, what identifies its metadata, and where its tensors lie. Reads no tensor."""

import hashlib
import math
import mmap
import pathlib
import struct
from dataclasses import dataclass, replace

from ptq.errors import UserError

MOST, MOST_DIMENSIONS = 5_000_000, 8
"""More metadata, tensors or texts, and more dimensions of a tensor, than any model has: a header that says so is damaged."""
# By the number of a metadata value's type: its form in `struct`, its bytes; 8 is a string, 9 an array.
STRING = 8
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: in llama.cpp's words.
        shape: rows before columns, as torch has it.
        kind: its type, a number of `gguf.GGMLQuantizationType`.
        offset: of its first byte in the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


def check_gguf(path: pathlib.Path) -> str:
    """Walks over the metadata and the tensor table; every tensor must lie inside the file.

    Returns:
        SHA-256 over the metadata and the tensor table: config and tokenizer depend on nothing else in the file.

    Raises:
        UserError: for a file that is no GGUF, damaged or cut short.
    """
    if path.stat().st_size < 24:
        raise UserError(f"model.path: {path} is truncated ({path.stat().st_size} bytes): download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise UserError(f"model.path: {path} is no GGUF file: its first bytes are not 'GGUF'")
        try:
            header, tensors = _walk(data)
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError):
            raise UserError(
                f"model.path: {path} is truncated or damaged (its header cannot be read): download it again"
            ) from None
        promised = max((tensor.offset + tensor.size for tensor in tensors), default=header)
        if promised > len(data):
            raise UserError(f"model.path: {path} is truncated ({len(data)} bytes of {promised}): download it again")
        return hashlib.sha256(data[:header]).hexdigest()


def tensors_of(path: pathlib.Path) -> list[StoredTensor]:
    """Returns the tensors of a checked file in its order: in a moment, where gguf's reader takes seconds for a vocabulary."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _walk(data)[1]


def metadata_of(path: pathlib.Path, keys: set[str]) -> dict[str, str | int | float | bool]:
    """Returns the values of these metadata `keys` that a checked file has: texts, numbers, true or false; no arrays."""
    found: dict[str, str | int | float | bool] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (entries,), position = struct.unpack_from("<Q", data, 16), 24
        for _ in range(entries):
            after = _skip_value(data, position, STRING)
            key, (kind,) = data[position + 8 : after].decode(errors="replace"), struct.unpack_from("<I", data, after)
            start, position = after + 4, _skip_value(data, after + 4, kind)
            if key not in keys:
                continue
            if kind == STRING:
                found[key] = data[start + 8 : position].decode(errors="replace")
            elif kind in FORMS:
                (found[key],) = struct.unpack_from(f"<{FORMS[kind]}", data, start)
    return found


def _walk(data: mmap.mmap) -> tuple[int, list[StoredTensor]]:
    """Returns the length of the header in bytes, and the tensors that it promises."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, count, entries = struct.unpack_from("<IQQ", data, 4)
    position, alignment = 24, 32
    if count > MOST or entries > MOST:
        raise ValueError(f"{max(count, entries)} tensors or entries")
    for _ in range(entries):
        (length,) = struct.unpack_from("<Q", data, position)
        key = data[position + 8 : position + 8 + length]
        position += 8 + length
        (kind,) = struct.unpack_from("<I", data, position)
        if key == b"general.alignment":
            (alignment,) = struct.unpack_from("<I", data, position + 4)
            if kind != 4 or alignment == 0 or alignment % 8:
                raise ValueError(f"an alignment of {alignment}")
        position = _skip_value(data, position + 4, kind)
    tensors = []
    for _ in range(count):
        after = _skip_value(data, position, STRING)
        name, position = data[position + 8 : after].decode(errors="replace"), after
        (dimensions,) = struct.unpack_from("<I", data, position)
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, position + 4)
        position += 4 + 8 * dimensions + 12
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        tensors.append(StoredTensor(name, tuple(shape[::-1]), kind, offset, math.prod(shape) // block * size))
    start = -(-position // alignment) * alignment
    return position, [replace(tensor, offset=start + tensor.offset) for tensor in tensors]


def _skip_value(data: mmap.mmap, position: int, kind: int) -> int:
    if kind == 8:
        (length,) = struct.unpack_from("<Q", data, position)
        return position + 8 + int(length)
    if kind != 9:
        return position + SIZES[kind]
    inner, count = struct.unpack_from("<IQ", data, position)
    position += 12
    if inner == 9:
        raise ValueError("an array of arrays")
    if inner == 8 and count > MOST:
        raise ValueError(f"{count} texts")
    if inner in SIZES:
        return position + int(count) * SIZES[inner]
    for _ in range(count):
        position = _skip_value(data, position, inner)
    return position
