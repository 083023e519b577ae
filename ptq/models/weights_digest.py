"""What tells one model's weights from another's: a digest of every byte, of tensors that are read anyway on the way."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json
from ptq.files.safetensors_file import PIECE, StoredTensor, TensorDigests, header_bytes, read_header
from ptq.files.store import Store

SETTLED_NS = 2_000_000_000
"""Age of a file's last change from which on a later change shows in its times; FAT counts in steps of two seconds."""
KIND = "weights-digest"
MATRICES = 3
"""Dimensions of a tensor from which on its slices have digests of their own: experts are read one by one."""


class ModelDigest:
    """The fingerprint of a model's files: known before, or known when its tensors have been read.

    Args:
        plain: files that count as they are: the config, code of the model's own, a GGUF file.
        shards: safetensors files, which count by their headers and the digests of their tensors.
        store: where digests are kept by the files' paths, sizes, times and inodes; None to keep none.
    """

    def __init__(self, plain: Sequence[pathlib.Path], shards: Sequence[pathlib.Path] = (), store: Store | None = None):
        self.read = TensorDigests()
        """Digests of tensors that were read for another purpose."""
        self._plain, self._shards, self._store = list(plain), list(shards), store
        self._states = _states([*self._plain, *self._shards])
        self._value: str | None = None

    @classmethod
    def named(cls, value: str) -> "ModelDigest":
        """Returns one whose value is known: a commit of the hub names the bytes."""
        made = cls(())
        made._value = value
        return made

    @property
    def state(self) -> str:
        """Digest of the files' paths, sizes, times and inodes when this was made: equal where no file has changed."""
        return hashlib.sha256(json.dumps(self._states, sort_keys=True).encode()).hexdigest()

    def known(self) -> str | None:
        """Returns the value where it is known without reading the weights, else None."""
        if self._value is None and self._store is not None:
            found = self._store.find(KIND, self._key())
            if found is not None:
                self._value = str(parse_json((found.parent / _FILE).read_text(encoding="utf-8"))["sha256"])
        return self._value

    def value(self) -> str:
        """Returns the SHA-256 over names, sizes and bytes; what has not been read yet is read now."""
        if self._value is None:
            files = [*self._plain, *self._shards]
            self._value = _kept(
                files, self._states, self._store, lambda: _of_model(self._plain, self._shards, self.read)
            )
        return self._value

    def agrees(self, found: Mapping[tuple[str, int, int], str]) -> bool:
        """Returns whether the files hold, where tensors of these digests were read once, the same bytes still; they are read for it."""
        shards = {shard.name: shard for shard in self._shards}
        again = TensorDigests()
        try:
            for (name, start, end), digest in found.items():
                if again.of(StoredTensor(shards[name], start, end, torch.uint8, (end - start,))) != digest:
                    return False
        except (KeyError, OSError, ValueError):
            return False
        return True

    def _key(self) -> dict[str, object]:
        return {"files": self._states}


def digest_files(files: Iterable[pathlib.Path], store: Store | None = None) -> str:
    """Returns the SHA-256 over the names, sizes and bytes of `files`.

    With a `store` they are read once: files with the path, size, times and inode that they had then have the digest that
    they had then.
    """
    return ModelDigest(list(files), (), store).value()


def leaves(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """Yields what of a stored tensor has a digest of its own: its slices along the first of three dimensions, or all of it."""
    if len(tensor.shape) < MATRICES:
        yield tensor
        return
    for i in range(tensor.shape[0]):
        yield tensor.row(tensor.shape, i)


_FILE = "digest.json"


def _kept(
    paths: list[pathlib.Path], states: list[dict[str, object]], store: Store | None, compute: Callable[[], str]
) -> str:
    """Returns the store's digest of files in these states, or the one that is computed, which is kept where they are settled."""
    if store is None:
        return compute()
    digests: list[str] = []

    def fill(folder: pathlib.Path) -> None:
        digests.append(compute())
        # Files written while, or just before, they were read may change again within one tick of their file system's clock.
        newest = max(max(int(str(s["mtime_ns"])), int(str(s["ctime_ns"]))) for s in states)
        if _states(paths) != states or time.time_ns() - newest < SETTLED_NS:
            raise _Unsettled
        write_text(folder / _FILE, json.dumps({"sha256": digests[0]}))

    try:
        folder = store.keep(KIND, {"files": states}, fill, str(paths[0].parent))
    except _Unsettled:
        return digests[0]
    found: dict[str, Any] = parse_json((folder / _FILE).read_text(encoding="utf-8"))
    return str(found["sha256"])


class _Unsettled(Exception):
    """Raised to keep no digest of files that may still be changing."""


def _states(paths: list[pathlib.Path]) -> list[dict[str, object]]:
    """Returns what tells whether a file is the one that it was, for each file. Links count as what they point to."""
    found = []
    for path in paths:
        state = path.stat()
        times = {"mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
        place = {"name": path.name, "path": os.path.realpath(path), "inode": state.st_ino, "size": state.st_size}
        found.append({**place, **times})
    return found


def _of_model(plain: list[pathlib.Path], shards: list[pathlib.Path], read: TensorDigests) -> str:
    digest = _digest(plain)
    if not shards:
        return digest
    whole = hashlib.sha256(digest.encode())
    for shard in shards:
        header = header_bytes(shard)
        whole.update(f"{shard.name}:{shard.stat().st_size}:{hashlib.sha256(header).hexdigest()}".encode())
        for tensor in sorted(read_header(shard).values(), key=lambda t: t.start):
            for leaf in leaves(tensor):
                whole.update(read.of(leaf).encode())
    return whole.hexdigest()


def _digest(paths: list[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(PIECE)
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
