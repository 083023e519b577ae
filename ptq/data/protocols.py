"""The files that a measuring protocol reads and that nobody may pass on with this package: what they are, and whether one is it."""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ptq.errors import UserError
from ptq.files.atomic import write_atomic

DATA = "~/.local/share/ptq"
"""Where shipped configs look for such files, unless PTQ_DATA names another folder."""
MOST_BYTES = 1 << 26
"""Larger files are not looked into."""


@dataclass(frozen=True)
class ProtocolFile:
    """A file by its bytes: `name` in the data folder, `size`, `sha256`, and in words `origin`, where it comes from."""

    name: str
    size: int
    sha256: str
    origin: str

    def is_in(self, content: bytes) -> bool:
        """Whether these are the file's bytes."""
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256


PROTOCOLS = {
    "smol-wt2": (
        ProtocolFile(
            "wikitext2-valid-tokenized.txt",
            1_121_681,
            "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "WikiText-2 (CC BY-SA), the validation part in its tokenized form: wiki.valid.tokens of wikitext-2-v1",
        ),
        ProtocolFile(
            "wikitext2-test-head.txt",
            560_737,
            "f212a2d3c9943d55b27ddfcc52becce55536360a49f876fa3b8358f6c94a2e54",
            "WikiText-2 (CC BY-SA), the first 45% of the raw test part in whole articles, its blank lines left out: "
            "wiki.test.raw of wikitext-2-raw-v1",
        ),
    )
}


def data_folder() -> pathlib.Path:
    """Returns the folder in which shipped configs look for the files of protocols."""
    return pathlib.Path(os.environ.get("PTQ_DATA") or DATA).expanduser()


def place(file: ProtocolFile, paths: list[pathlib.Path], folder: pathlib.Path) -> str:
    """Puts a protocol's file into `folder`, out of `paths` (files, or folders of them), unless it lies there already.

    A path may hold more than the file: its first bytes are tried, and those of its lines without the blank ones.

    Returns:
        What was found or done, in one line.

    Raises:
        UserError: for a folder that cannot be written to, or a path that cannot be read.
    """
    target = folder / file.name
    if target.is_file() and target.stat().st_size == file.size and file.is_in(_read(target)):
        return f"{file.name}: there, as it should be"
    for path in paths:
        for content in _beginnings(_read(path), file.size):
            if file.is_in(content):
                write_atomic(target, partial(_write, content))
                return f"{file.name}: taken from {path}"
    wrong = "is another file" if target.exists() else "is not there"
    return f"{file.name}: {wrong}: {file.size} bytes, SHA-256 {file.sha256}; {file.origin}"


def files_of(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the files among `paths`, and those directly in folders among them, that are small enough to be looked into.

    Raises:
        UserError: for a path that is not there.
    """
    found: list[pathlib.Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: is not there: name files, or folders of them")
        found += sorted(path.iterdir()) if path.is_dir() else [path]
    return [path for path in found if path.is_file() and path.stat().st_size <= MOST_BYTES]


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend its permissions") from None


def _write(content: bytes, path: pathlib.Path) -> None:
    path.write_bytes(content)


def _beginnings(content: bytes, size: int) -> Iterator[bytes]:
    yield content[:size]
    yield b"".join(line for line in content.splitlines(keepends=True) if line.strip())[:size]
