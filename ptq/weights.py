"""Where the parameters are: the files that hold them, and how they come into memory, all of them or one module's worth."""

import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ptq.errors import UserError
from ptq.memory import return_freed_memory

PIECE = 1 << 23
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Weights(Protocol):
    """Brings parameters into memory."""

    @property
    def resident(self) -> bool:
        """Whether everything is in memory all the time."""

    def hold(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside the context, the parameters of the submodules `names` are in memory."""


class ResidentWeights:
    """Everything is in memory all the time."""

    resident = True

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Does nothing."""
        yield


@dataclass(frozen=True)
class Stored:
    """One tensor inside a safetensors file: its bytes are ``file[start:end]``."""

    file: pathlib.Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yields the tensor's values in order, flat, at most 8 MiB at a time; a piece is valid until the next one.

        Plain reads, not a memory map: pages of a map count as the process's memory for as long as it lives.
        """
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
                yield torch.frombuffer(view, dtype=self.dtype)
                left -= len(view)

    def read(self, rounding: torch.dtype, arithmetic: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the tensor on `device`; floating point is rounded to `rounding`, then held as `arithmetic`."""
        floating = self.dtype.is_floating_point
        value = torch.empty(self.shape, dtype=arithmetic if floating else self.dtype, device=device)
        # Through the arithmetic type first, as a resident model is: two roundings may differ from one.
        exact = not floating or self.dtype == rounding
        flat, position = value.view(-1), 0
        for piece in self.pieces():
            # On the device the copy must be complete before the buffer is filled again: copy_ from pageable memory is.
            flat[position : position + len(piece)].copy_(piece if exact else piece.to(arithmetic).to(rounding))
            position += len(piece)
        return value

    def overflows(self, dtype: torch.dtype) -> bool:
        """Returns whether a value is beyond the range of `dtype`."""
        most = torch.finfo(dtype).max
        return self.dtype.is_floating_point and any(bool((piece.float().abs() > most).any()) for piece in self.pieces())


def read_header(path: pathlib.Path) -> dict[str, Stored]:
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
        header = json.loads(file.read(length))
    tensors: dict[str, Stored] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                if not all(isinstance(n, int) and n >= 0 for n in (*shape, *entry["data_offsets"])):
                    raise ValueError(f"the shape or the place of {name} is no row of whole numbers from 0")
                if math.prod(shape) * dtype.itemsize != end - start:
                    raise ValueError(f"the shape of {name} does not fit its bytes")
                tensors[name] = Stored(path, start, end, dtype, shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the header is damaged ({error})") from None
    promised = max((t.end for t in tensors.values()), default=8 + length)
    if promised != size:
        raise ValueError(f"its header promises {promised} bytes, the file has {size}")
    return tensors


class OffloadedWeights:
    """Parameters are read from disk when a module is held, and dropped after.

    Args:
        model: the model; its offloaded parameters are on the meta device.
        stored: where each parameter is, by full name; tied parameters name the same bytes and share one tensor in a hold.
        rounding: what floating point values are rounded to.
        arithmetic: what they are computed with.
        device: where the arithmetic happens.
        keep: anything that must live as long as the weights, such as the temporary folder of converted ones.
    """

    resident = False

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, Stored],
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        keep: Any = None,
    ):
        self._model, self._stored, self._device, self._keep = model, dict(stored), device, keep
        self._rounding, self._arithmetic = rounding, arithmetic

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Reads what the submodules `names` need; on leaving, their meta tensors are put back."""
        held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        read: dict[Stored, torch.Tensor] = {}
        try:
            for owner, name, full in self._missing(names):
                stored = self._stored[full]
                if stored not in read:
                    read[stored] = stored.read(self._rounding, self._arithmetic, self._device)
                held.append((owner, name, owner[name]))
                owner[name] = _in_place_of(owner[name], read[stored])
            # From here on the model alone holds the tensors: whoever takes one out of it frees its memory.
            read.clear()
            yield
        finally:
            for owner, name, before in held:
                owner[name] = before
            return_freed_memory()

    def _missing(self, names: Iterable[str]) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Yields (the dictionary that holds it, name in it, full name) of the parameters and buffers that are on meta."""
        for outer in names:
            for inner, module in self._model.get_submodule(outer).named_modules():
                prefix = ".".join(p for p in (outer, inner) if p)
                owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for owner in owners:
                    for name, tensor in list(owner.items()):
                        if tensor is not None and tensor.device.type == "meta":
                            yield owner, name, f"{prefix}.{name}" if prefix else name


def _in_place_of(before: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"model.path: {path} is no JSON ({' '.join(str(error).split())}): download the model again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"model.path: {path} holds no JSON object: download the model again")
    return value


def check_config(folder: pathlib.Path) -> None:
    """Raises `UserError` unless the folder has a config.json that is a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.path: {folder} has no config.json: expected a folder saved by save_pretrained")
    _read_json(path)


def check_directory(folder: pathlib.Path) -> None:
    """Raises `UserError` unless the folder has a config and every byte of the weights that its headers promise."""
    check_config(folder)
    for shard in shards_of(folder):
        try:
            read_header(shard)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.path: {shard} is truncated or damaged ({reason}): download it again") from None


def shards_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the weights' files that transformers reads in this folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        convert = (
            "pickled weights are not read: save it again with safe_serialization" if pickles else "download the weights"
        )
        raise UserError(f"model.path: {folder} has no model.safetensors and no model.safetensors.index.json: {convert}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"model.path: {index} names no shards: download the model again")
    shards = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"model.path: {folder} lacks {shard.name}, which its index names: download the model again")
    return shards


def digest_files(files: Iterable[pathlib.Path]) -> str:
    """Returns the SHA-256 over the names, sizes and bytes of `files`."""
    digest = hashlib.sha256()
    buffer = bytearray(PIECE)
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
