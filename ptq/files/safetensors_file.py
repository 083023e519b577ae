"""What a safetensors file holds, read with bounds, and one tensor of it, read piece by piece."""

import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from ptq.files.atomic import write_atomic
from ptq.files.bounded import parse_json

PIECE = 1 << 20
_HEADER_LEAST, _HEADER_ENTRY = 1 << 12, 7 << 5
"""Bytes that are left for a header beside its entries, and for an entry, most of which is a name; both multiples of 8."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a safetensors file: its bytes are ``file[start:end]``."""

    file: pathlib.Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def pieces(self, digests: "TensorDigests | None" = None) -> Iterator[torch.Tensor]:
        """Yields the tensor's values in order, flat, at most 1 MiB at a time; a piece is valid until the next one.

        Plain reads, not a memory map: pages of a map count as the process's memory for as long as it lives. `digests` notes
        the digest of what was read, once all of it has been.
        """
        digest = None if digests is None or digests.knows(self) else hashlib.sha256()
        buffer = bytearray(min(PIECE, self.end - self.start))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            left = self.end - self.start
            while left:
                view = memoryview(buffer)[: min(left, len(buffer))]
                filled = 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise ValueError(f"{self.file} became shorter while it was read")
                    filled += count
                if digest is not None:
                    digest.update(view)
                yield torch.frombuffer(view, dtype=self.dtype)
                left -= len(view)
        if digest is not None and digests is not None:
            digests.note(self, digest.hexdigest())

    def read(
        self,
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        digests: "TensorDigests | None" = None,
    ) -> torch.Tensor:
        """Returns the tensor on `device`; floating point is rounded to `rounding`, then held as `arithmetic`."""
        floating = self.dtype.is_floating_point
        value = torch.empty(self.shape, dtype=arithmetic if floating else self.dtype, device=device)
        # Through the arithmetic type first, as a resident model is: two roundings may differ from one.
        exact = not floating or self.dtype == rounding
        flat, position = value.view(-1), 0
        for piece in self.pieces(digests):
            # On the device the copy must be complete before the buffer is filled again: copy_ from pageable memory is.
            flat[position : position + len(piece)].copy_(piece if exact else piece.to(arithmetic).to(rounding))
            position += len(piece)
        return value

    def overflows(self, dtype: torch.dtype) -> bool:
        """Returns whether a value is beyond the range of `dtype`."""
        if self.dtype == dtype:
            return False
        most = torch.finfo(dtype).max
        return self.dtype.is_floating_point and any(bool((piece.float().abs() > most).any()) for piece in self.pieces())

    def row(self, shape: tuple[int, ...], index: int) -> "StoredTensor":
        """Returns one of the tensors that this one, seen as `shape`, has along its first dimension.

        Raises:
            ValueError: when the shape has another number of values.
        """
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} has no {shape[0]} tensors of {shape[1:]}")
        size = (self.end - self.start) // shape[0]
        start = self.start + index * size
        return StoredTensor(self.file, start, start + size, self.dtype, shape[1:])


class TensorDigests:
    """SHA-256 of the bytes of stored tensors, noted while they are read for another purpose."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int, int], str] = {}
        """Digest by name of the file, first byte and end."""

    def knows(self, tensor: StoredTensor) -> bool:
        """Whether the tensor's digest has been noted."""
        return _place(tensor) in self.found

    def note(self, tensor: StoredTensor, digest: str) -> None:
        """Notes the digest of a tensor's bytes."""
        self.found[_place(tensor)] = digest

    def of(self, tensor: StoredTensor) -> str:
        """Returns the tensor's digest; it is read unless it has been."""
        if not self.knows(tensor):
            for _ in tensor.pieces(self):
                pass
        return self.found[_place(tensor)]


def _place(tensor: StoredTensor) -> tuple[str, int, int]:
    return tensor.file.name, tensor.start, tensor.end


def header_bytes(path: pathlib.Path) -> bytes:
    """Returns the bytes before the tensors of a safetensors file that `read_header` has found whole."""
    with path.open("rb") as file:
        head = file.read(8)
        (length,) = struct.unpack("<Q", head)
        return head + file.read(length)


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns what a safetensors file holds, by name, without reading it.

    Raises:
        ValueError: when the header is damaged or the file is not as long as it promises.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("the file ends inside its header")
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            raise ValueError("the file ends inside its header")
        header = parse_json(file.read(length))
    tensors: dict[str, StoredTensor] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                if not all(isinstance(n, int) and n >= 0 for n in (*shape, *entry["data_offsets"])):
                    raise ValueError(f"the shape or the place of {name} is no row of whole numbers from 0")
                if math.prod(shape) * dtype.itemsize != end - start:
                    raise ValueError(f"the shape of {name} does not fit its bytes")
                tensors[name] = StoredTensor(path, start, end, dtype, shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the header is damaged ({error})") from None
    promised = max((t.end for t in tensors.values()), default=8 + length)
    if promised != size:
        raise ValueError(f"its header promises {promised} bytes, the file has {size}")
    return tensors


def write_tensors(
    path: pathlib.Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors of any layout as a safetensors file, whole or not at all.

    Tensors may share memory (cluster labels, input scales, views of one another), which safetensors refuses: each gets bytes
    of its own in the file. Only those that share are copied, and those that are not contiguous.

    Raises:
        UserError: when the place cannot be written to or the disk is full.
    """
    taken: set[tuple[torch.device, int]] = set()
    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        storage = (value.device, value.untyped_storage().data_ptr())
        if storage in taken:
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(storage)
        own[name] = value.contiguous()
    write_atomic(path, lambda temporary: save_file(own, temporary, metadata=dict(metadata) if metadata else None))


def write_as_they_come(
    path: pathlib.Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    names: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file of tensors of any shape and type that come one after the other, of which none is kept.

    The header, which says where each lies, is written last, into room that is left for it; what it does not take is blank.

    Args:
        path: the file, which is no safetensors file until all have come.
        tensors: names and values.
        names: how many will come at most.
        metadata: for the file's header.

    Raises:
        ValueError: where there is no room for the header.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    room = _HEADER_LEAST + names * _HEADER_ENTRY
    end = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, value in tensors:
            plain = value.detach().cpu().contiguous()
            start, end = end, end + plain.nbytes
            header[name] = {"dtype": codes[plain.dtype], "shape": list(plain.shape), "data_offsets": [start, end]}
            plain.view(-1).view(torch.uint8).numpy().tofile(file)
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > room:
            raise ValueError(f"the header of {path.name} takes {len(text)} bytes, and there is room for {room}")
        file.seek(0)
        file.write(struct.pack("<Q", room) + text.ljust(room))


def write_one_by_one(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all, of `tensors` that come one after the other, of which none is kept.

    Args:
        path: the file.
        shapes: of all the tensors that will come, by name.
        dtype: the type of all of them.
        tensors: names and values, in any order.
        metadata: for the file's header.

    Raises:
        ValueError: when a tensor is not as `shapes` and `dtype` say, comes twice or does not come.
        UserError: when the place cannot be written to or the disk is full.
    """
    code = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], start = end, end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers may map the values, which then lie at a multiple of their size

    def write(temporary: pathlib.Path) -> None:
        left = dict(starts)
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
            for name, value in tensors:
                if name not in left or tuple(value.shape) != shapes[name] or value.dtype != dtype:
                    raise ValueError(
                        f"{name} is not one of the tensors that were to come, or another than it was to be"
                    )
                file.seek(8 + len(text) + left.pop(name))
                value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
        if left:
            raise ValueError(f"{next(iter(left))} has not come")

    write_atomic(path, write)
