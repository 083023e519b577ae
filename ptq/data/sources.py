"""Texts by name: CPython's own documentation, files, and the data sets of METHODS.md section 8."""

import difflib
import hashlib
import importlib
import json
import pathlib
import random
from dataclasses import dataclass
from typing import Any

from ptq.config import TextConfig
from ptq.errors import UserError, nearest

SUFFIXES = (".txt", ".jsonl", ".parquet")
PROBE_BYTES = 1 << 16


@dataclass(frozen=True)
class Text:
    """A text to tokenise. `documents` are joined by `joiner`; with `slices` every window lies inside one document instead."""

    name: str
    documents: tuple[str, ...]
    joiner: str = "\n\n"
    slices: bool = False

    @property
    def joined(self) -> str:
        """The whole text."""
        return self.joiner.join(self.documents)


def read_text(config: TextConfig, field: str) -> Text:
    """Reads the text that `config` names; `field` is its place in the recipe, for messages. Mixes are read part by part.

    Raises:
        UserError: for a file that is missing, empty or no text, and a data set that cannot be reached.
    """
    if config.source == "docs":
        return Text(f"docs/{config.split}", tuple(_docs(config.split)))
    if config.source == "file":
        path = pathlib.Path(str(config.path)).expanduser()
        check_source(config, field)
        documents = _FILES[path.suffix](path, config.text_column, field)
        if not any(d.strip() for d in documents):
            raise UserError(f"{field}.path: {path} is empty: name a file with text")
        return Text(f"file/{path.name}", documents)
    return _hub_text(config, field)


def check_source(config: TextConfig, field: str) -> None:
    """Checks what can be checked without reading the whole text or asking the network. Raises `UserError`."""
    for i, part in enumerate(config.mix):
        check_source(part, f"{field}.mix[{i}]")
    if config.source != "file":
        return
    path = pathlib.Path(str(config.path)).expanduser()
    if path.is_dir():
        raise UserError(f"{field}.path: {path} is a folder: name a file in it ({', '.join(SUFFIXES)})")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        raise UserError(
            f"{field}.path: {path} is not there" + (f"; did you mean {close[0]!r}?" if close else ": check the path")
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{field}.path: {path.name} ends in {path.suffix!r}: expected one of {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        head = file.read(PROBE_BYTES)
    if not head.strip():
        raise UserError(f"{field}.path: {path} is empty: name a file with text")
    if path.suffix != ".parquet" and b"\0" in head:
        raise UserError(f"{field}.path: {path} is a binary file: expected UTF-8 text")


def _docs(split: str) -> list[str]:
    """Topics of `pydoc_data.topics`, shared out by a hash of their text: parts that never overlap, in any CPython.

    Several topics have the same text under different names: each text is taken once. Of ten texts six calibrate (train),
    one validates and three test.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    share = {"train": range(6), "validation": range(6, 7), "test": range(7, 10)}[split]
    texts = dict.fromkeys(text for _, text in sorted(topics.items()))
    return [text for text in texts if hashlib.sha256(text.encode()).digest()[0] % 10 in share]


def _read_utf8(path: pathlib.Path, field: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}.path: {path} is no UTF-8 text (byte {error.start}): convert it to UTF-8") from None


def _txt(path: pathlib.Path, column: str, field: str) -> tuple[str, ...]:
    return (_read_utf8(path, field),)


def _jsonl(path: pathlib.Path, column: str, field: str) -> tuple[str, ...]:
    documents = []
    for number, line in enumerate(_read_utf8(path, field).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{field}.path: {path} line {number} is no JSON ({error.msg}): mend the line") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            keys = list(row) if isinstance(row, dict) else []
            raise UserError(
                f"{field}.text_column: {path} line {number} has no text under {column!r}{nearest(column, keys)}"
            )
        documents.append(row[column])
    return tuple(documents)


def _parquet(path: pathlib.Path, column: str, field: str) -> tuple[str, ...]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise UserError(f"{field}.text_column: {path} has no column {column!r}{nearest(column, names)}")
        values = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{field}.path: {path} is no Parquet file or damaged ({str(error).splitlines()[0]})") from None
    if any(v is not None and not isinstance(v, str) for v in values):
        raise UserError(f"{field}.text_column: column {column!r} of {path} holds no text: name a column of strings")
    return tuple(v for v in values if v)


_FILES = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


@dataclass(frozen=True)
class _HubText:
    """Where a named variant lies on the hub, and how its rows become a text."""

    dataset: str
    name: str | None
    column: str
    joiner: str
    files: dict[str, str] | None = None
    rows: int | None = None
    slices: bool = False


_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_HUB = {
    ("wikitext2", None): _HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n"),
    ("ptb", "old"): _HubText("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "\n\n"),
    ("ptb", "new"): _HubText("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", " "),
    ("c4", "old"): _HubText("allenai/c4", None, "text", "", _C4, None, True),
    ("c4", "new"): _HubText("allenai/c4", None, "text", " ", _C4, 1100),
    ("pile", None): _HubText("mit-han-lab/pile-val-backup", None, "text", "\n\n"),
}


def _hub_text(config: TextConfig, field: str) -> Text:
    place = _HUB[config.source, config.variant]
    split = config.split
    if config.source == "pile":
        split = "validation"
    if place.files is not None and split == "test":
        split = "validation"
    name = "/".join(p for p in (config.source, config.variant, split) if p)
    rows = _load_rows(place, split, f"{field}.source: {config.source}")
    documents = [str(row) for row in rows[: place.rows]] if place.rows else [str(row) for row in rows]
    return Text(name, tuple(documents), place.joiner, place.slices)


def _load_rows(place: _HubText, split: str, field: str) -> list[Any]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if place.files is not None:
            loaded = datasets.load_dataset(place.dataset, data_files={split: place.files[split]}, split=split)
        else:
            loaded = datasets.load_dataset(place.dataset, place.name, split=split)
        return list(loaded[place.column])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"{field} ({place.dataset}) cannot be loaded ({reason}): connect to the hub once, or use source docs or file"
        ) from None


def shuffled(documents: tuple[str, ...], seed: int) -> list[str]:
    """Returns the documents in an order drawn by `seed`."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order
