"""What a model file holds: header, tensors, sizes, the greatest error that rounding can have made. For any file written here."""

import pathlib
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ptq.errors import UserError
from ptq.files.bounded import parse_json
from ptq.files.safetensors_file import StoredTensor, read_header
from ptq.inspect import q8_readers as readers
from ptq.inspect.gguf_reader import read_gguf

LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header: the limit of the safetensors library."""
SCALES = ("scale", "weight_scale")
CODES = {"scale": ("codes",), "weight_scale": ("weight", "weight_packed")}
"""Which tensors of a Linear a scale belongs to, by the scale's last name."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `greatest_error` is half of its greatest step, None where it is in floating point."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    greatest_error: float | None


@dataclass(frozen=True)
class Report:
    """What was found."""

    format: str
    bytes: int
    header: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def inspect(path: pathlib.Path) -> Report:
    """Returns what the file, or the folder with safetensors, holds.

    Raises:
        UserError: one line, for a file that is missing, foreign, truncated or damaged. Nothing is allocated from a
            length in the file that the file itself does not bear out.
    """
    try:
        if path.is_dir():
            return _folder(path)
        if not path.is_file():
            what = "neither a file nor a folder" if path.exists() else "no such file"
            raise UserError(f"{path}: {what}: give a model file, or a folder with model.safetensors")
        with path.open("rb") as file:
            head = file.read(16)
        if readers.is_llama2c(head):
            return _q8(readers.open_llama2c(path))
        if head[:4] == b"GGUF":
            return _gguf(path)
        if head[8:9] == b"{" or path.suffix == ".safetensors":
            return _safetensors([path], {})
        return _kuiper(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def table(report: Report, path: pathlib.Path) -> list[Table]:
    """Returns the header and the tensors as tables."""
    header = Table(title=f"{path}: {report.format}, {report.bytes} bytes", show_header=False, title_justify="left")
    for key, value in report.header.items():
        header.add_row(key, str(value))
    tensors = Table("tensor", "shape", "type", "bytes", "greatest error", title_justify="left")
    for t in report.tensors:
        error = "" if t.greatest_error is None else f"{t.greatest_error:.3g}"
        tensors.add_row(t.name, " x ".join(map(str, t.shape)), t.type, str(t.bytes), error)
    errors = [t.greatest_error for t in report.tensors if t.greatest_error is not None]
    total = sum(t.bytes for t in report.tensors)
    tensors.add_row(f"{len(report.tensors)} tensors", "", "", str(total), f"{max(errors):.3g}" if errors else "")
    return [header, tensors]


def _q8(file: readers.Q8File) -> Report:
    header = {k: v for k, v in vars(file.header).items() if k != "format"}
    kinds = {"q8": "int8, fp32 scales", "f32": "fp32"}
    tensors = tuple(
        TensorInfo(p.name, p.shape, kinds[p.kind], p.bytes, file.greatest_error(p.name)) for p in file.places.values()
    )
    return Report(file.header.format, file.path.stat().st_size, header, tensors)


def _kuiper(path: pathlib.Path) -> Report:
    try:
        return _q8(readers.open_kuiper(path))
    except UserError as error:
        # Without a magic number nothing tells a damaged file from a foreign one.
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(
            f"{path}: neither llama2.c, GGUF nor safetensors, and as KuiperLLama int8 it is {reason}"
        ) from None


def _gguf(path: pathlib.Path) -> Report:
    file = read_gguf(path)
    tensors = tuple(TensorInfo(t.name, t.shape, t.type, t.bytes, file.greatest_error(t)) for t in file.tensors)
    return Report("GGUF", path.stat().st_size, file.metadata, tensors)


def _folder(path: pathlib.Path) -> Report:
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{path}: a folder without safetensors: give a model file, or a folder with model.safetensors")
    for shard in shards:
        if not shard.is_file():  # a pipe would be waited for
            raise UserError(f"{shard}: no file, though it has the name of one: take it out of the folder")
    header: dict[str, Any] = {}
    config = path / "config.json"
    if config.is_file():
        try:
            content = parse_json(config.read_text(encoding="utf-8"))
            quantization = dict(content.get("quantization_config") or {})
            header = {"model_type": content.get("model_type"), **quantization}
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{config}: no JSON object: export it again") from None
    elif config.exists() or config.is_symlink():
        raise UserError(f"{config}: no file, though it has the name of one: take it out of the folder")
    return _safetensors(shards, header)


def _safetensors(paths: list[pathlib.Path], header: dict[str, Any]) -> Report:
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            stored |= read_header(path)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: truncated or damaged ({reason}): export it again") from None
    errors: dict[str, float] = {}
    for name, entry in stored.items():
        owner, _, last = name.rpartition(".")
        if last in SCALES and entry.dtype.is_floating_point and not owner.endswith(".inputs"):
            steps = [float(piece.float().abs().max()) for piece in entry.pieces()]
            errors |= {f"{owner}.{codes}": max(steps, default=0.0) / 2 for codes in CODES[last]}
    integers = {name for name, entry in stored.items() if not entry.dtype.is_floating_point}
    tensors = tuple(
        TensorInfo(
            name, entry.shape, str(entry.dtype).removeprefix("torch."), entry.end - entry.start,
            errors.get(name) if name in integers else None,
        )
        for name, entry in sorted(stored.items())
    )  # fmt: skip
    return Report(_kind(header), sum(path.stat().st_size for path in paths), header, tensors)


def _kind(header: dict[str, Any]) -> str:
    return "compressed-tensors" if header.get("quant_method") == "compressed-tensors" else "safetensors"
