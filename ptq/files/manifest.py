"""The manifest of an entry in the store: what the entry is, and the SHA-256 of every byte in it."""

import hashlib
import json
import os
import pathlib
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader

from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json

MANIFEST = "manifest.json"
FORMAT = "ptq-entry/1"
_LARGEST = 1 << 24
"""Bytes of a manifest at most; a larger one is none of ours."""


class DamagedEntry(ValueError):
    """An entry that does not agree with its manifest; its text says how."""


@dataclass(frozen=True)
class Manifest:
    """What an entry says of itself.

    Attributes:
        kind: such as ``baseline``.
        key: all that the entry depends on.
        about: a few words for people on what it was computed from.
        made: when, in seconds since 1970.
        files: SHA-256 of each file, by its path in the entry.
    """

    kind: str
    key: dict[str, object]
    about: str
    made: float
    files: dict[str, str]


def key_digest(key: Mapping[str, object]) -> str:
    """Returns 24 hex digits over a key: the name of its entry."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def write_manifest(folder: pathlib.Path, kind: str, key: Mapping[str, object], about: str) -> None:
    """Writes the manifest of what is in `folder` now."""
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in _files(folder)}
    content = {"format": FORMAT, "kind": kind, "key": key, "about": about, "made": time.time(), "files": files}
    write_text(folder / MANIFEST, json.dumps(content, indent=1))


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Returns the manifest of the entry `folder`, which lies under its kind's folder and is named for its key.

    Raises:
        DamagedEntry: when there is none, it cannot be read, or it is of another kind or key than its place says.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise DamagedEntry("it is no folder")
        with _opened(folder / MANIFEST) as file:
            content = parse_json(file.read(_LARGEST))
        if content["format"] != FORMAT:
            raise DamagedEntry("its manifest is of another version")
        found = Manifest(content["kind"], dict(content["key"]), str(content["about"]), float(content["made"]), {})
        found.files.update({str(name): str(digest) for name, digest in content["files"].items()})
    except DamagedEntry:
        raise
    except OSError as error:
        raise DamagedEntry(f"its manifest cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise DamagedEntry("its manifest is no manifest") from None
    if (found.kind, key_digest(found.key)) != (folder.parent.name, folder.name):
        raise DamagedEntry("its manifest is of another entry")
    return found


def check_entry(folder: pathlib.Path) -> Manifest:
    """Returns the manifest of an entry of which every byte is right.

    Raises:
        DamagedEntry: for the first file that is missing, too much, changed, no plain file, or cannot be read.
    """
    found = read_manifest(folder)
    try:
        there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    except OSError as error:
        raise DamagedEntry(f"it cannot be read: {error.strerror}") from None
    there.pop(MANIFEST, None)
    if not found.files or there.keys() != found.files.keys():
        odd = sorted(there.keys() ^ found.files.keys())
        raise DamagedEntry(
            f"{odd[0]} is {'missing' if odd[0] in found.files else 'too much'}" if odd else "it is empty"
        )
    for name, digest in found.files.items():
        try:
            same = file_digest(there[name]) == digest
        except OSError as error:
            raise DamagedEntry(f"{name} cannot be read: {error.strerror}") from None
        if not same:
            raise DamagedEntry(f"{name} is not what was written")
    return found


def file_digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a plain file. Raises `OSError` for anything else, such as a FIFO, without waiting for it."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: pathlib.Path) -> BufferedReader:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "no plain file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns everything in `folder`, however deep, that is no folder."""

    def fail(error: OSError) -> None:
        raise error

    return sorted(pathlib.Path(above) / name for above, _, names in os.walk(folder, onerror=fail) for name in names)
