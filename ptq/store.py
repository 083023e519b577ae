"""The store: results of earlier work, found by a hash of everything that they depend on."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping

from ptq.files import write_atomic


class Store:
    """A folder of files whose names are hashes of what they were computed from. An entry is never changed, only added."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def path(self, kind: str, key: Mapping[str, object]) -> pathlib.Path:
        """Returns where the entry of `kind` for `key` is, or would be."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / kind / f"{digest}.safetensors"

    def find(self, kind: str, key: Mapping[str, object]) -> pathlib.Path | None:
        """Returns the entry's file, or None when this work has not been done yet."""
        path = self.path(kind, key)
        return path if path.is_file() else None

    def add(self, kind: str, key: Mapping[str, object], write: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """Lets `write` fill the entry's file; it appears under its name only when whole."""
        path = self.path(kind, key)
        write_atomic(path, write)
        return path
