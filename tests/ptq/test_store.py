"""The store and the writing of files: old or new, never half."""

import errno

import pytest

from ptq.errors import UserError
from ptq.files import write_atomic, write_text
from ptq.store import Store


def test_an_entry_is_found_again_by_an_equal_key_only(tmp_path):
    store = Store(tmp_path)
    key = {"a": 1, "b": "x"}
    assert store.find("kind", key) is None
    path = store.add("kind", key, lambda p: p.write_bytes(b"result"))
    assert store.find("kind", {"b": "x", "a": 1}) == path and path.read_bytes() == b"result"
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
