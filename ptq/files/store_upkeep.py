"""Looking after a store: what is in it, what of it is damaged, and making room."""

import os
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ptq.files.manifest import MANIFEST, DamagedEntry, check_entry, read_manifest
from ptq.files.scratch import remove, scratch_path
from ptq.files.store import Store, unused

_ENTRY = re.compile(r"[0-9a-f]{24}(\.safetensors)?")
"""Names of entries; those of earlier versions were single files."""


@dataclass(frozen=True)
class Entry:
    """One entry of a store.

    Attributes:
        path: its folder (a file, in earlier versions).
        kind: such as ``baseline``.
        bytes: of all its files.
        made: when, in seconds since 1970; None where its manifest does not say.
        used: when it was last read or written, in seconds since 1970.
        about: what it was computed from, in words of the run that made it.
        damage: what is wrong with its manifest, or None. Its other files are looked at by `damage_of` only.
    """

    path: pathlib.Path
    kind: str
    bytes: int
    made: float | None
    used: float
    about: str
    damage: str | None


def entries(store: Store) -> list[Entry]:
    """Returns the entries of a store, the least recently used first. What is named otherwise than an entry is left out."""
    found = [_entry(path) for path in _places(store.folder)]
    return sorted(found, key=lambda entry: (entry.used, str(entry.path)))


def damage_of(entry: Entry) -> str | None:
    """Returns what is wrong with an entry, every byte of it read; None when it is whole."""
    try:
        check_entry(entry.path)
    except DamagedEntry as error:
        return str(error)
    return None


def collect(store: Store, most: int) -> tuple[list[Entry], list[Entry]]:
    """Removes entries, the least recently used first, until the rest takes `most` bytes at most.

    Damaged ones and those of earlier versions, which no run reads, go before all others, and what killed processes left as well.

    Returns:
        What went, and what would have gone but is in use by a live process.
    """
    store.sweep()
    there = sorted(entries(store), key=lambda entry: entry.damage is None)  # stable: by use among equals
    total = sum(entry.bytes for entry in there)
    gone: list[Entry] = []
    busy: list[Entry] = []
    for entry in there:
        if total <= most:
            break
        if _removed(entry.path):
            gone.append(entry)
            total -= entry.bytes
        else:
            busy.append(entry)
    return gone, busy


def _removed(path: pathlib.Path) -> bool:
    with unused(path) as free:
        if not free:
            return False
        # Renamed first: nobody finds half of an entry, and whoever was about to take hold of it sees that it has gone.
        going = scratch_path(path.parent, path.name)
        os.rename(path, going)
    remove(going)
    return True


def _places(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    try:
        kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return
    for kind in kinds:
        try:
            yield from sorted(path for path in kind.iterdir() if _ENTRY.fullmatch(path.name))
        except PermissionError:
            continue


def _entry(path: pathlib.Path) -> Entry:
    files = [path, *(pathlib.Path(above) / name for above, _, names in os.walk(path) for name in names)]
    sizes = sum(file.lstat().st_size for file in files if not file.is_dir() and os.path.lexists(file))
    manifest = path / MANIFEST
    try:
        used = (manifest if manifest.is_file() else path).lstat().st_mtime
    except OSError:
        used = path.lstat().st_mtime
    try:
        found = read_manifest(path)
    except DamagedEntry as error:
        earlier = path.suffix == ".safetensors" and path.is_file()
        reason = "of an earlier version, which no run reads any more" if earlier else str(error)
        return Entry(path, path.parent.name, sizes, None, used, "", reason)
    return Entry(path, found.kind, sizes, found.made, used, found.about, None)
