"""Readers of llama2.c version 2 and KuiperLLama int8 files, written from the formats' description (METHODS.md section 9).

Nothing is allocated from a number in a header before the header as a whole has been found to promise exactly the bytes
that the file has.
"""

import pathlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ptq.errors import UserError

PIECE = 1 << 20


@dataclass(frozen=True)
class Q8Header:
    """The header of either format; `shared` when the embedding is the output matrix too."""

    format: str
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    shared: bool
    group_size: int

    @property
    def kv_dim(self) -> int:
        """Width of all keys, or all values, of a token."""
        return self.dim // self.heads * self.kv_heads


@dataclass(frozen=True)
class Place:
    """Where a tensor is: `kind` is ``q8`` (int8 codes, then fp32 scales) or ``f32``."""

    name: str
    shape: tuple[int, int] | tuple[int]
    kind: str
    offset: int
    bytes: int

    @property
    def values(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=object))


class Q8File:
    """A file of either format whose header has been checked; tensors are read when asked for."""

    def __init__(self, path: pathlib.Path, header: Q8Header, places: list[Place]):
        self.path, self.header = path, header
        self.places = {place.name: place for place in places}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor in float32; a quantized one as what its codes and scales stand for."""
        place = self.places[name]
        if place.kind == "f32":
            return torch.from_numpy(self._array(place.offset, place.values, "<f4")).reshape(place.shape)
        codes = torch.from_numpy(self._array(place.offset, place.values, "i1"))
        groups = codes.reshape(-1, self.header.group_size).float()
        return (groups * self.scales(name)[:, None]).reshape(place.shape)

    def scales(self, name: str) -> torch.Tensor:
        """Returns the scales of a quantized tensor (groups,)."""
        place = self.places[name]
        return torch.from_numpy(self._array(place.offset + place.values, place.values // self.header.group_size, "<f4"))

    def greatest_error(self, name: str) -> float | None:
        """Returns half of the tensor's greatest step: no value rounded to nearest is further away; None for fp32.

        Raises:
            UserError: for a scale that is negative, NaN or inf.
        """
        if self.places[name].kind != "q8":
            return None
        scales = self.scales(name)
        if not (torch.isfinite(scales).all() and (scales >= 0).all()):
            raise UserError(f"{self.path}: damaged: {name} holds a scale that is negative, NaN or inf: export it again")
        return float(scales.max()) / 2

    def _array(self, offset: int, count: int, kind: str) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(offset)
            values = np.fromfile(file, dtype=kind, count=count)
        if len(values) != count:
            raise UserError(f"{self.path}: became shorter while it was read: export it again")
        return values


def is_llama2c(head: bytes) -> bool:
    """Returns whether a file begins as llama2.c's versions do (``ak42``, as a little-endian number)."""
    return head[:4] == (0x616B3432).to_bytes(4, "little")


def open_llama2c(path: pathlib.Path) -> Q8File:
    """Opens a llama2.c version 2 file. Raises `UserError` for anything else, in one line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
    if len(head) < 256:
        raise UserError(f"{path}: truncated: {len(head)} bytes, a llama2.c header has 256: export it again")
    version, *sizes = struct.unpack_from("<i7i", head, 4)
    if not is_llama2c(head) or version != 2:
        raise UserError(f"{path}: llama2.c version {version}: expected version 2 (int8)")
    shared, group_size = struct.unpack_from("<Bi", head, 36)
    if shared not in (0, 1):
        raise UserError(f"{path}: damaged: the shared-classifier byte is {shared}: expected 0 or 1")
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = sizes
    header = Q8Header(
        "llama2.c version 2", dim, hidden, layers, heads, kv_heads, vocabulary, positions, bool(shared), group_size
    )
    _check(path, header, 256 + _llama2c_bytes(header), size)
    return Q8File(path, header, list(_places(_llama2c_tensors(header), 256, group_size)))


def open_kuiper(path: pathlib.Path) -> Q8File:
    """Opens a KuiperLLama int8 file, which has no magic number. Raises `UserError` for anything else, in one line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(32)
    if len(head) < 32:
        raise UserError(f"{path}: truncated: {len(head)} bytes, a KuiperLLama header has 32: export it again")
    dim, hidden, layers, heads, kv_heads, vocabulary, positions, group_size = struct.unpack("<8i", head)
    header = Q8Header(
        "KuiperLLama int8", dim, hidden, layers, heads, kv_heads, abs(vocabulary), positions, vocabulary > 0, group_size
    )
    _check(path, header, 32 + _kuiper_bytes(header), size)
    return Q8File(path, header, list(_places(_kuiper_tensors(header), 32, group_size)))


def _check(path: pathlib.Path, header: Q8Header, promised: int, size: int) -> None:
    """Refuses a header whose numbers do not fit each other or the file's size."""
    for field in ("dim", "hidden_dim", "layers", "heads", "kv_heads", "vocabulary", "positions", "group_size"):
        if getattr(header, field) < 1:
            raise UserError(
                f"{path}: damaged: {field} is {getattr(header, field)} in its header, expected 1 or more: export it again"
            )
    if header.dim % header.heads or header.heads % header.kv_heads or (header.dim // header.heads) % 2:
        raise UserError(
            f"{path}: damaged: {header.heads} heads and {header.kv_heads} key heads do not divide dim {header.dim}: export it again"
        )
    if header.dim % header.group_size or header.hidden_dim % header.group_size:
        raise UserError(
            f"{path}: damaged: group_size {header.group_size} does not divide dim {header.dim} and hidden_dim {header.hidden_dim}: export it again"
        )
    if promised != size:
        state = "truncated" if size < promised else "damaged"
        raise UserError(f"{path}: {state}: its header promises {promised} bytes, the file has {size}: export it again")


def _matrix_values(header: Q8Header) -> int:
    """Returns the number of values of the seven Linears of a block."""
    return header.dim * (2 * header.dim + 2 * header.kv_dim + 3 * header.hidden_dim)


def _llama2c_bytes(header: Q8Header) -> int:
    if min(header.heads, header.group_size) < 1:
        return -1
    tables = 1 if header.shared else 2
    values = header.layers * _matrix_values(header) + tables * header.vocabulary * header.dim
    return 4 * header.dim * (2 * header.layers + 1) + values + 4 * (values // header.group_size)


def _kuiper_bytes(header: Q8Header) -> int:
    if min(header.heads, header.group_size) < 1:
        return -1
    values = header.layers * _matrix_values(header) + (0 if header.shared else header.vocabulary * header.dim)
    plain = header.vocabulary * header.dim + header.dim * (2 * header.layers + 1)
    return values + 4 * (values // header.group_size) + 4 * plain


Tensor = tuple[str, tuple[int, int] | tuple[int], str]


def _matrices(h: Q8Header) -> Iterator[Tensor]:
    shapes = {
        "wq": (h.dim, h.dim), "wk": (h.kv_dim, h.dim), "wv": (h.kv_dim, h.dim), "wo": (h.dim, h.dim),
        "w1": (h.hidden_dim, h.dim), "w2": (h.dim, h.hidden_dim), "w3": (h.hidden_dim, h.dim),
    }  # fmt: skip
    for name, shape in shapes.items():
        for layer in range(h.layers):
            yield f"layers.{layer}.{name}", shape, "q8"


def _norms(h: Q8Header) -> Iterator[Tensor]:
    for name in ("attention_norm", "ffn_norm"):
        for layer in range(h.layers):
            yield f"layers.{layer}.{name}", (h.dim,), "f32"
    yield "final_norm", (h.dim,), "f32"


def _llama2c_tensors(h: Q8Header) -> Iterator[Tensor]:
    yield from _norms(h)
    yield "tok_embeddings", (h.vocabulary, h.dim), "q8"
    yield from _matrices(h)
    if not h.shared:
        yield "output", (h.vocabulary, h.dim), "q8"


def _kuiper_tensors(h: Q8Header) -> Iterator[Tensor]:
    yield from _matrices(h)
    if not h.shared:
        yield "output", (h.vocabulary, h.dim), "q8"
    yield "tok_embeddings", (h.vocabulary, h.dim), "f32"
    yield from _norms(h)


def _places(tensors: Iterator[Tensor], offset: int, group_size: int) -> Iterator[Place]:
    for name, shape, kind in tensors:
        values = shape[0] * (shape[1] if len(shape) == 2 else 1)
        size = values + 4 * (values // group_size) if kind == "q8" else 4 * values
        yield Place(name, shape, kind, offset, size)
        offset += size
