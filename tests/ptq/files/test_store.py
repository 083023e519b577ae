"""The store and the writing of files: old or new, never half."""

import errno
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.errors import UserError
from ptq.files.atomic import MANIFEST, STALE_SECONDS, keep_folder, write_atomic, write_text
from ptq.files.store import Store


def test_an_entry_is_found_again_by_an_equal_key_only(tmp_path):
    store = Store(tmp_path)
    key = {"a": 1, "b": "x"}
    assert store.find("kind", key) is None
    path = store.add("kind", key, lambda p: save_file({"x": torch.ones(3)}, p))
    assert store.find("kind", {"b": "x", "a": 1}) == path and load_file(path)["x"].sum() == 3
    assert store.find("kind", {"a": 2, "b": "x"}) is None and store.find("other", key) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, code):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(code, "no")

    with pytest.raises(UserError) as error:
        write_atomic(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert ("the disk is full" in str(error.value)) == (code == errno.ENOSPC)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", stop)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_was_cut_short_counts_as_not_done_yet(tmp_path):
    store, key = Store(tmp_path), {"a": 1}

    def write(path):
        save_file({"x": torch.ones(100)}, path)

    path = store.add("kind", key, write)
    whole = path.read_bytes()
    for cut in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert store.find("kind", key) is None
    assert store.add("kind", key, write) == path and store.find("kind", key) == path


@pytest.fixture
def kept(tmp_path):
    """A folder that counts how often it was filled."""
    filled = []

    def fill(folder):
        filled.append(folder)
        (folder / "a").write_text("a" * 1000)
        (folder / "b").write_text("b")

    def keep():
        return keep_folder(tmp_path / "kept", fill)

    keep()
    return keep, filled


def test_a_kept_folder_is_filled_once(kept, tmp_path):
    keep, filled = kept
    assert {path.name for path in keep().iterdir()} == {"a", "b", MANIFEST}
    assert len(filled) == 1 and [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "no manifest", "manifest cut", "gone", "a file"])
def test_a_kept_folder_that_was_harmed_is_filled_again(kept, tmp_path, harm):
    keep, filled = kept
    folder = tmp_path / "kept"
    if harm == "cut":
        (folder / "a").write_text("a" * 999)
    elif harm == "changed":
        (folder / "a").write_text("a" * 999 + "b")
    elif harm == "missing":
        (folder / "b").unlink()
    elif harm == "no manifest":
        (folder / MANIFEST).unlink()
    elif harm == "manifest cut":
        (folder / MANIFEST).write_text("{")
    else:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        if harm == "a file":
            folder.write_text("")
    assert (keep() / "a").read_text() == "a" * 1000
    assert len(filled) == 2 and keep() and len(filled) == 2


def test_a_folder_that_cannot_be_filled_leaves_nothing_and_the_rubbish_of_the_killed_is_swept(tmp_path):
    left, fresh = tmp_path / ".kept.left", tmp_path / ".kept.fresh"
    for path in (left, fresh):
        path.mkdir()
    os.utime(left, (0, time.time() - STALE_SECONDS - 10))

    def fail(folder):
        (folder / "a").write_text("half")
        raise OSError(errno.ENOSPC, "no")

    with pytest.raises(UserError, match="the disk is full"):
        keep_folder(tmp_path / "kept", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".kept.fresh"]
