"""The digest of a model's weights is kept: files that are the ones that they were are not read again."""

import os

import pytest

from ptq.files.store import Store
from ptq.models import weights_digest
from ptq.models.weights_digest import digest_files


@pytest.fixture
def read(monkeypatch):
    """The names of files that were read for a digest, in order; changes count as settled at once."""
    names = []
    digest = weights_digest._digest

    def counted(paths):
        names.extend(path.name for path in paths)
        return digest(paths)

    monkeypatch.setattr(weights_digest, "_digest", counted)
    monkeypatch.setattr(weights_digest, "SETTLED_NS", 0)
    return names


def digest(folder, store):
    """Digests as a process of its own does."""
    return digest_files(sorted(folder.iterdir()), Store(store))


def test_weights_are_read_once_for_their_digest_and_again_when_they_may_be_others(tmp_path, read):
    folder, store = tmp_path / "model", tmp_path / "store"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(name.encode() * 100)
    first = digest(folder, store)
    assert digest(folder, store) == first == digest_files(sorted(folder.iterdir()))
    assert read == ["a.safetensors", "b.safetensors"] * 2  # once with a store, once without one
    read.clear()

    path = folder / "a.safetensors"
    times = path.stat()
    # The same size and modification time, other bytes, in place: the time of the inode's change tells.
    path.write_bytes(b"x" + path.read_bytes()[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = digest(folder, store)
    assert changed != first and len(read) == 2
    # Another file put in its place, with its size and modification time.
    (tmp_path / "other").write_bytes(b"y" + path.read_bytes()[1:])
    os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(tmp_path / "other", path)
    assert digest(folder, store) not in {first, changed} and len(read) == 4
    folder.rename(tmp_path / "elsewhere")
    digest(tmp_path / "elsewhere", store)
    assert len(read) == 6
    digest(tmp_path / "elsewhere", store)
    assert len(read) == 6


def test_the_digest_of_files_that_have_just_been_written_is_not_kept(tmp_path, read, monkeypatch):
    monkeypatch.setattr(weights_digest, "SETTLED_NS", 10**15)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(b"a")
    assert digest(tmp_path / "model", tmp_path / "store") == digest(tmp_path / "model", tmp_path / "store")
    assert len(read) == 2
