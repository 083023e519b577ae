"""The writing of files and folders: old or new, never half, never lost."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from ptq.errors import UserError
from ptq.files import atomic
from ptq.files.atomic import write_atomic, write_folder_atomic, write_text


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


def test_a_file_and_its_folder_are_written_through_before_and_after_the_renaming(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    target = {}
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), target.update(a=str(a)), replace(a, b))[2])
    write_text(tmp_path / "x", "text")
    assert order == [target["a"], "rename", str(tmp_path)]


def fill(words):
    return lambda folder: (folder / "a").write_text(words)


@pytest.mark.parametrize("exchange", [True, False], ids=["names exchanged", "two renames"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupt_at_any_renaming_of_a_folder_loses_neither_the_old_nor_the_new(
    tmp_path, monkeypatch, exchange, number
):
    path = tmp_path / "out"
    write_folder_atomic(path, fill("old"))
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    replace, calls = os.replace, []

    def interrupted(a, b):
        calls.append(a)
        if len(calls) == number:
            raise KeyboardInterrupt
        return replace(a, b)

    monkeypatch.setattr(os, "replace", interrupted)
    try:
        write_folder_atomic(path, fill("new"))
        done = "new"
    except KeyboardInterrupt:
        done = "old"
    monkeypatch.undo()
    assert (path / "a").read_text() == done and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_whose_process_was_killed_between_two_renames_is_back_at_the_next_write(tmp_path):
    write_folder_atomic(tmp_path / "out", fill("old"))
    code = (
        "import os, pathlib, signal, sys\n"
        "from ptq.files import atomic\n"
        "atomic._exchange = lambda one, other: False\n"
        "real = os.replace\n"
        "def replace(a, b):\n"
        "    real(a, b)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = replace\n"
        "atomic.write_folder_atomic(pathlib.Path(sys.argv[1]), lambda f: (f / 'a').write_text('new'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=60)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    write_text(tmp_path / "other", "")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_what_a_killed_process_left_half_written_goes_at_the_next_write_beside_it(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        "from ptq.files.atomic import write_atomic\n"
        "def die(path):\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(pathlib.Path(sys.argv[1]), die)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], timeout=60)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "y", "")
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_a_name_as_long_as_a_file_may_have_can_be_written(tmp_path):
    path = tmp_path / ("é" * 127)
    write_text(path, "text")
    assert path.read_text() == "text" and len(list(tmp_path.iterdir())) == 1
