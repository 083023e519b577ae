"""Texts by name: CPython's own documentation, files, and the data sets of METHODS.md section 8."""

import codecs
import contextlib
import difflib
import hashlib
import importlib
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ptq.config.schema import DataConfig, TextConfig
from ptq.errors import UserError, nearest
from ptq.files.bounded import parse_json

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")
PROBE_BYTES = 1 << 16
_PARQUET = b"PAR1"  # the first and the last bytes of every Parquet file


@dataclass(frozen=True)
class Text:
    """A text to tokenise. `documents` are joined by `joiner`; with `slices` every window lies inside one document instead.

    `windows` is how many windows the protocol of this text takes when the recipe asks for all (None: all there are).
    """

    name: str
    documents: tuple[str, ...]
    joiner: str = "\n\n"
    slices: bool = False
    windows: int | None = None

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
        check_source(config, field)
        path = _path(config, field)
        documents = _FILES[path.suffix.lower()](path, config.text_column, field)
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
    path = _path(config, field)
    try:
        _check_file(path, field)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{field}.path: {path} cannot be read ({reason}): check the path and its permissions") from None


def _path(config: TextConfig, field: str) -> pathlib.Path:
    try:
        return pathlib.Path(str(config.path)).expanduser()
    except RuntimeError:
        raise UserError(f"{field}.path: {config.path} names a home folder that is not known: write it out") from None


def _check_file(path: pathlib.Path, field: str) -> None:
    if path.is_dir():
        raise UserError(f"{field}.path: {path} is a folder: name a file in it ({', '.join(SUFFIXES)})")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        raise UserError(
            f"{field}.path: {path} is not there" + (f"; did you mean {close[0]!r}?" if close else ": check the path")
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{field}.path: {path.name} ends in {path.suffix!r}: expected one of {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        head = file.read(PROBE_BYTES)
        # Never before the end of the leading mark: four bytes alone are no beginning and end at once.
        file.seek(max(len(_PARQUET), path.stat().st_size - len(_PARQUET)))
        tail = file.read(len(_PARQUET))
    if not head.strip():
        raise UserError(f"{field}.path: {path} is empty: name a file with text")
    if path.suffix.lower() == ".parquet":
        if not (head.startswith(_PARQUET) and tail == _PARQUET):
            raise UserError(f"{field}.path: {path} is no Parquet file or was cut short: write or copy it again")
        return
    _refuse_nul(b"\0" in head, path, field)
    try:
        # A character may be cut in two where the probe ends: only a whole file must end with a whole character.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < PROBE_BYTES)
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error, field) from None


def _refuse_nul(found: bool, path: pathlib.Path, field: str) -> None:
    if found:
        raise UserError(f"{field}.path: {path} is a binary file (it holds NUL bytes): expected UTF-8 text")


def _no_utf8(path: pathlib.Path, error: UnicodeDecodeError, field: str) -> UserError:
    return UserError(f"{field}.path: {path} is no UTF-8 text (byte {error.start}): convert it to UTF-8")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _docs(split: str) -> list[str]:
    """Topics of `pydoc_data.topics`, shared out by a hash of their text: parts that never overlap, in any CPython.

    Several topics have the same text under different names: each text is taken once. Topics quote one another at length too:
    validation and test are without the paragraphs that the parts before them hold.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = [text for _, text in sorted(topics.items())]
    earlier: set[str] = set()
    for part in SPLITS[: SPLITS.index(split)]:
        earlier.update(_words(p) for text in _share(texts, part) for p in _paragraphs(text))
    found = [_without(text, earlier) for text in _share(texts, split)]
    return [text for text in found if text.strip()]


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _without(text: str, paragraphs: set[str]) -> str:
    """Returns the text without these paragraphs, however they are indented and filled."""
    own = _paragraphs(text)
    kept = [p for p in own if _words(p) not in paragraphs]
    return text if len(kept) == len(own) else "\n\n".join(kept)


def _share(texts: Iterable[str], split: str) -> list[str]:
    """Returns the different texts that belong to `split` by a hash of their own: of ten six train, one validates, three test."""
    share = {"train": range(6), "validation": range(6, 7), "test": range(7, 10)}[split]
    return [text for text in dict.fromkeys(texts) if hashlib.sha256(text.encode()).digest()[0] % 10 in share]


def _read_utf8(path: pathlib.Path, field: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error, field) from None
    _refuse_nul("\0" in text, path, field)
    return text


def _txt(path: pathlib.Path, column: str, field: str) -> tuple[str, ...]:
    return (_read_utf8(path, field),)


def _jsonl(path: pathlib.Path, column: str, field: str) -> tuple[str, ...]:
    documents = []
    # Not splitlines: JSON allows U+2028 and its like inside a string, and they end no line here.
    for number, line in enumerate(_read_utf8(path, field).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{field}.path: {path} line {number} is no JSON ({error}): mend the line") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            keys = list(row) if isinstance(row, dict) else []
            raise UserError(
                f"{field}.text_column: {path} line {number} has no text under {column!r}{nearest(column, keys)}"
            )
        if not _encodable(row[column]):
            raise UserError(f"{field}.path: {path} line {number} holds half a surrogate pair: mend the line")
        documents.append(row[column])
    return tuple(documents)


def _encodable(text: str) -> bool:
    # JSON can spell half a surrogate pair (\ud800), which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: pathlib.Path, column: str, field: str) -> tuple[str, ...]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise UserError(f"{field}.text_column: {path} has no column {column!r}{nearest(column, names)}")
        values = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{field}.path: {path} is no Parquet file or damaged ({_first_line(error)})") from None
    if any(v is not None and not isinstance(v, str) for v in values):
        raise UserError(f"{field}.text_column: column {column!r} of {path} holds no text: name a column of strings")
    return tuple(v for v in values if v)


_FILES = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


@dataclass(frozen=True)
class _HubText:
    """Where a named variant lies on the hub, and how its rows become a text.

    `splits` maps a recipe's split to that of the data set where they differ, `files` holds the files by split. `rows`
    limits the documents, `windows` what "all windows" means (METHODS.md section 8). With `shared` the data set has one part
    only, whose documents are shared out among the splits.
    """

    dataset: str
    name: str | None
    column: str
    joiner: str
    splits: dict[str, str] | None = None
    files: dict[str, str] | None = None
    revision: str | None = None
    rows: int | None = None
    windows: int | None = None
    slices: bool = False
    shared: bool = False

    def part(self, split: str) -> str:
        """Returns the data set's own name of what a recipe's `split` reads."""
        return (self.splits or {}).get(split, split)


_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
# The data set itself is a script, which datasets 4 and later refuse; the hub keeps its rows as Parquet on this branch.
_PTB_BRANCH = "refs/convert/parquet"
_PTB_FILES = {split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")}
_PTB = "ptb-text-only/ptb_text_only"
_ON_VALIDATION = {"test": "validation"}  # variants that are evaluated on the validation part
_HUB = {
    ("wikitext2", None): _HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n"),
    ("ptb", "old"): _HubText(_PTB, None, "sentence", "\n\n", _ON_VALIDATION, _PTB_FILES, _PTB_BRANCH),
    ("ptb", "new"): _HubText(_PTB, None, "sentence", " ", None, _PTB_FILES, _PTB_BRANCH),
    ("c4", "old"): _HubText("allenai/c4", None, "text", "", _ON_VALIDATION, _C4_FILES, windows=256, slices=True),
    ("c4", "new"): _HubText("allenai/c4", None, "text", " ", _ON_VALIDATION, _C4_FILES, rows=1100, windows=256),
    ("pile", None): _HubText(
        "mit-han-lab/pile-val-backup", None, "text", "\n\n", {"train": "validation", "test": "validation"}, shared=True
    ),
}


def _hub_text(config: TextConfig, field: str) -> Text:
    place = _HUB[config.source, config.variant]
    part = place.part(config.split)
    name = _join(config.source, config.variant, part)
    rows = [str(row) for row in _load_rows(place, part, f"{field}.source: {config.source}")]
    if place.shared:
        name, rows = _join(name, config.split), _share(rows, config.split)
    return Text(name, tuple(rows[: place.rows]), place.joiner, place.slices, place.windows)


def _join(*names: str | None) -> str:
    return "/".join(name for name in names if name)


def check_disjoint(data: DataConfig) -> None:
    """Refuses to calibrate on the part of a text that the recipe evaluates on, also where two splits read one part.

    Names alone are compared, before any text is read; what files hold is compared by `ptq.data.overlap`.

    Raises:
        UserError: naming both fields.
    """
    evaluated = dict(_parts(data.evaluation, "data.evaluation"))
    for part, field in _parts(data.calibration, "data.calibration"):
        if part in evaluated:
            raise UserError(
                f"{field}.split: reads {part}, which {evaluated[part]}.split evaluates on: "
                f"{_another(data)}, or use data.allow_overlap=true"
            )


def _another(data: DataConfig) -> str:
    return "evaluate on split test" if data.calibration.split == "train" else "calibrate on split train"


def _parts(config: TextConfig, field: str) -> Iterator[tuple[str, str]]:
    for i, item in enumerate(config.mix):
        yield from _parts(item, f"{field}.mix[{i}]")
    place = _HUB.get((config.source, config.variant))
    if place is not None:
        # Variants differ in how the rows are joined, not in the rows.
        yield _join(config.source, place.part(config.split), config.split if place.shared else None), field
    elif config.source == "docs":
        yield _join(config.source, config.split), field


def _load_rows(place: _HubText, split: str, field: str) -> list[Any]:
    import datasets

    datasets.disable_progress_bars()
    files = None if place.files is None else {split: place.files[split]}
    try:
        with _cache_only_unless_reachable(place):
            loaded = datasets.load_dataset(
                place.dataset, place.name, data_files=files, revision=place.revision, split=split
            )
        return list(loaded[place.column])
    # RuntimeError: data sets that are scripts; KeyError: a column that is gone.
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{field} ({place.dataset}) cannot be loaded ({_first_line(error)}): "
            "connect to the hub once, or use source docs or file"
        ) from None


@contextlib.contextmanager
def _cache_only_unless_reachable(place: _HubText) -> Iterator[None]:
    """Asks the hub once; without an answer `datasets` reads its cache only, and does not retry for half a minute."""
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(place.dataset, revision=place.revision, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # it answers: what it refuses, the load tells
    except Exception:  # the type depends on the HTTP library below huggingface_hub
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
