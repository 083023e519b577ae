"""The store: results of earlier work, found by a hash of everything that they depend on."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping

from ptq.config.schema import Recipe
from ptq.files.atomic import keep_folder, write_atomic
from ptq.files.safetensors_file import read_header


class Store:
    """A folder of files and folders whose names are hashes of what they were computed from. An entry is never changed, only added."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def path(self, kind: str, key: Mapping[str, object]) -> pathlib.Path:
        """Returns where the entry of `kind` for `key` is, or would be."""
        return self.folder / kind / f"{_digest(key)}.safetensors"

    def find(self, kind: str, key: Mapping[str, object]) -> pathlib.Path | None:
        """Returns the entry's file, or None when this work has not been done yet or the file has been cut short."""
        path = self.path(kind, key)
        try:
            read_header(path)
        except (OSError, ValueError):
            return None
        return path

    def add(self, kind: str, key: Mapping[str, object], write: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """Lets `write` fill the entry's file; it appears under its name only when whole."""
        path = self.path(kind, key)
        write_atomic(path, write)
        return path

    def keep(self, kind: str, key: Mapping[str, object], fill: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """Returns the folder of `kind` for `key`; `fill` fills it unless it is there and every byte in it is right."""
        return keep_folder(self.folder / kind / _digest(key), fill)


def store_of(recipe: Recipe) -> Store:
    """Returns the store that the recipe names."""
    return Store(pathlib.Path(recipe.store).expanduser())


def _digest(key: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
