"""Where the parameters are: the files that hold them, and how they come into memory, all of them or one module's worth."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ptq.errors import UserError
from ptq.files.bounded import parse_json
from ptq.files.safetensors_file import StoredTensor, TensorDigests, read_header
from ptq.models.memory.resident_memory import map_large_tensors, return_freed_memory
from ptq.models.read_ahead import ReadAhead, waiting_type, widened
from ptq.models.stored.mxfp4 import Mxfp4Matrix
from ptq.models.stored.stacked import JoinedTensor, StackedTensor
from quantize.checks import all_finite

OnDisk = StoredTensor | StackedTensor[JoinedTensor] | StackedTensor[Mxfp4Matrix]
"""Where a parameter of the model lies."""
Stored = OnDisk | JoinedTensor | Mxfp4Matrix
"""What is read at once: a tensor of a file, an expert's matrix out of its parts, or a whole stack of them."""


class Weights(Protocol):
    """Brings parameters into memory."""

    @property
    def resident(self) -> bool:
        """Whether everything is in memory all the time."""

    def take_apart(self, pieces: Mapping[str, "WeightPiece"]) -> None:
        """Notes that parameters of these full names are pieces of tensors that the model held before."""

    def spread(self, devices: Mapping[str, torch.device]) -> None:
        """Notes which device the parameters inside each of these modules are read into, where they are not in memory."""

    def hold(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside the context, the parameters of the submodules `names` are in memory."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to read what the next `hold` of these submodules needs; drops what was read for another one."""

    def tidy(self) -> None:
        """Gives back to the system what was freed while a block is held, where memory is short enough to keep weights on disk."""


class WeightPiece(Protocol):
    """One matrix, or some of its rows, of the tensor `source`, which holds `shape`[0] of them."""

    @property
    def source(self) -> str:
        """Full name of the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's, with the matrices first."""

    @property
    def expert(self) -> int:
        """Which matrix."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the piece of the matrix."""


class ResidentWeights:
    """Everything is in memory all the time."""

    resident = True

    def take_apart(self, pieces: Mapping[str, WeightPiece]) -> None:
        """Does nothing."""

    def spread(self, devices: Mapping[str, torch.device]) -> None:
        """Raises ValueError: what is in memory stays where it is."""
        raise ValueError("weights in memory are on one device")

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Does nothing."""
        yield

    def prefetch(self, names: Iterable[str]) -> None:
        """Does nothing."""

    def tidy(self) -> None:
        """Does nothing."""


class OffloadedWeights:
    """Parameters are read from disk when a module is held, and dropped after.

    Args:
        model: the model; its offloaded parameters are on the meta device.
        stored: where each parameter is, by full name; tied parameters name the same bytes and share one tensor in a hold.
        rounding: what floating point values are rounded to.
        arithmetic: what they are computed with.
        device: where the arithmetic happens.
        keep: anything that must live as long as the weights, such as the temporary folder of converted ones.
        ahead: whether `prefetch` reads.
        digests: notes the digests of what is read; None to note none.
    """

    resident = False

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, OnDisk],
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        keep: Any = None,
        ahead: bool = True,
        digests: TensorDigests | None = None,
    ):
        self._model, self._stored, self._device, self._keep = model, dict(stored), device, keep
        self._rounding, self._arithmetic = rounding, arithmetic
        self._pieces: dict[str, WeightPiece] = {}
        self._ahead, self._digests = ahead, digests
        self._reading: ReadAhead | None = None
        self._devices: dict[str, torch.device] = {}
        map_large_tensors()

    def spread(self, devices: Mapping[str, torch.device]) -> None:
        """Notes the device of each of these modules; buffers that are in memory already go there now."""
        self._devices = dict(devices)
        for outer, device in devices.items():
            for module in self._model.get_submodule(outer).modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and not buffer.is_meta:
                        module._buffers[name] = buffer.to(device)

    def take_apart(self, pieces: Mapping[str, WeightPiece]) -> None:
        """Notes that parameters of these full names are pieces of tensors that are stored."""
        self._pieces.update(pieces)

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Reads what the submodules `names` need; on leaving, their meta tensors are put back."""
        held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        read: dict[Stored, torch.Tensor] = {}
        missing = list(self._missing(names))
        ready = self._taken([full for *_, full in missing])
        take = widened(ready, self._arithmetic)
        try:
            for owner, name, full in missing:
                held.append((owner, name, owner[name]))
                value = take(full) if full in ready else self._read(full, read, self._device_of(full))
                owner[name] = _in_place_of(owner[name], value)
                del value
            del take
            # From here on the model alone holds the tensors: whoever takes one out of it frees its memory.
            read.clear()
            yield
        finally:
            for owner, name, before in held:
                owner[name] = before
            return_freed_memory()

    def prefetch(self, names: Iterable[str]) -> None:
        """Reads in a thread what the next `hold` of `names` needs; what is not there in time is waited for."""
        wanted = [full for *_, full in self._missing(names)] if self._ahead else []
        # What was read for another hold goes first: never more than one block lies ahead.
        self._reading = None
        if wanted:
            read: dict[Stored, torch.Tensor] = {}
            self._reading = ReadAhead(
                wanted, lambda full, device: self._read(full, read, device, waits=True), self._device_of(wanted[0])
            )

    def tidy(self) -> None:
        """Gives back what was freed."""
        return_freed_memory()

    def _device_of(self, full: str) -> torch.device:
        parts = full.split(".")
        inside = (".".join(parts[:count]) for count in range(len(parts), 0, -1)) if self._devices else ()
        return next((self._devices[name] for name in inside if name in self._devices), self._device)

    def _taken(self, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns what lies ready of these parameters, when they are what was read ahead."""
        if self._reading is None or self._reading.names != tuple(wanted):
            return {}
        reading, self._reading = self._reading, None
        return reading.result()

    def _read(
        self, full: str, read: dict[Stored, torch.Tensor], device: torch.device, waits: bool = False
    ) -> torch.Tensor:
        piece = self._pieces.get(full)
        stored: Stored = self._stored[full if piece is None else piece.source]
        if piece is not None:
            stored = self._stored[piece.source].row(piece.shape, piece.expert)
        if stored not in read:
            held_as = self._arithmetic
            if waits:
                held_as = waiting_type(stored.dtype, self._rounding, self._arithmetic)
            try:
                read[stored] = stored.read(self._rounding, held_as, device, self._digests)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"model.path: {stored.file}, which holds {full}, cannot be read any more ({' '.join(str(error).split())}): "
                    "mend the file; what was finished is kept, and the same command takes it up"
                ) from None
            refuse_not_finite(full, read[stored], str(stored.file))
        if piece is None:
            return read[stored]
        value = piece.of(read[stored])
        # Its other pieces are asked for next, and after them nobody holds the whole.
        own = value.clone(memory_format=torch.contiguous_format)
        for other in [s for s in read if s is not stored and s.file == stored.file and s.shape == stored.shape]:
            del read[other]
        return own

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


def refuse_not_finite(name: str, value: torch.Tensor, place: str) -> None:
    """Raises `UserError` where a weight that was read from the file `place` holds NaN or inf: nothing can be made of it."""
    if value.is_floating_point() and not all_finite(value):
        raise UserError(f"model.path: {name} in {place} holds NaN or inf: mend the file, or download the model again")


def _in_place_of(before: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
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


def check_shapes(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, Sequence[str]]
) -> None:
    """Raises `UserError` when a weight on disk has another shape than the model that its config.json describes, or a block has none.

    Args:
        folder: the model's.
        shapes: of the model's parameters by full name; what is stored under other names is for transformers to tell.
        blocks: by name of a block the full names of its Linears.
    """
    found: set[str] = set()
    for shard in shards_of(folder):
        for name, stored in read_header(shard).items():
            found.add(name)
            expected = shapes.get(name, stored.shape)
            if stored.shape != expected:
                raise UserError(
                    f"model.path: {name} is {list(stored.shape)} in {shard.name} and {list(expected)} by config.json: "
                    "download the model again"
                )
    there = {block: any(f"{name}.weight" in found for name in linears) for block, linears in blocks.items()}
    absent = [block for block, is_there in there.items() if not is_there]
    if absent and len(absent) < len(there):
        raise UserError(
            f"model.path: {folder} has no weights of {absent[0]}, one of {len(there)} blocks by config.json: download the model again"
        )


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
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if pathlib.PurePath(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"model.path: {index} names {name!r:.80}, which is no safetensors file of this folder: download the model again"
            )
    shards = [folder / name for name in names]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"model.path: {folder} lacks {shard.name}, which its index names: download the model again")
    return shards
