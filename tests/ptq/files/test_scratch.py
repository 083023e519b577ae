"""Scratch: that of dead processes is found, that of live ones never touched; room is there before it is written to."""

import errno
import os
import subprocess
import sys
import time

import pytest

from ptq.errors import UserError
from ptq.files import scratch
from ptq.files.scratch import STALE_SECONDS, ScratchFolder, remove_stale, reserve, scratch_path, stale_scratch


@pytest.fixture
def other(tmp_path):
    """A live process with a scratch folder in `tmp_path`."""
    code = (
        "import pathlib, sys, time\n"
        "from ptq.files.scratch import ScratchFolder\n"
        "folder = ScratchFolder('work', pathlib.Path(sys.argv[1]))\n"
        "(folder.path / 'x').write_text('x')\n"
        "print(folder.name, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline().strip()
    yield process
    process.kill()
    process.communicate()


def test_the_scratch_of_a_live_process_stays_and_that_of_a_killed_one_goes(tmp_path, other):
    [folder] = tmp_path.iterdir()
    os.utime(folder, (0, 0))  # age says nothing of a process that can be seen
    os.utime(folder / "x", (0, 0))
    assert stale_scratch(tmp_path) == [] and remove_stale(tmp_path) == []
    other.kill()  # not waited for: a zombie has ended too
    for _ in range(100):
        if stale_scratch(tmp_path):
            break
        time.sleep(0.05)
    assert stale_scratch(tmp_path) == [folder] == remove_stale(tmp_path) and list(tmp_path.iterdir()) == []


def test_a_process_that_ends_by_itself_takes_its_scratch_along(tmp_path, other):
    other.communicate(b"")
    assert other.returncode == 0 and list(tmp_path.iterdir()) == []


def test_another_process_that_has_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path):
    mine = scratch_path(tmp_path, "x")
    start = scratch.start_of(os.getpid())
    earlier = mine.with_name(mine.name.replace(f"-{start}-", f"-{start - 1}-"))
    for path in (mine, earlier):
        path.write_text("")
    assert stale_scratch(tmp_path) == [earlier]


def test_scratch_of_another_machine_goes_when_nothing_in_it_was_written_for_a_day(tmp_path):
    mine = scratch_path(tmp_path, "x").name
    fresh, old, used = (tmp_path / mine.replace(scratch.this_host(), f"{n:08x}") for n in (1, 2, 3))
    long_ago = time.time() - STALE_SECONDS - 10
    for folder in (fresh, old, used):
        folder.mkdir()
        (folder / "hidden.bin").write_text("")
    for path in (old / "hidden.bin", old, used):
        os.utime(path, (long_ago, long_ago))
    assert stale_scratch(tmp_path) == [old]


def test_files_of_others_are_never_taken_for_scratch(tmp_path):
    mine = scratch_path(tmp_path, "x").name
    names = (
        ".x",
        ".x.ptq-1-2-3-4",
        "x.ptq-00000000-1-1-00000000",
        f"{mine}x",
        mine.removeprefix("."),
        ".x.0123456789abcdef",
    )
    for name in names:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 0))
    assert stale_scratch(tmp_path) == [] and stale_scratch(tmp_path / "missing") == []


def test_a_scratch_folder_is_removed_by_cleanup_and_with_its_object(tmp_path):
    one, two = ScratchFolder("one", tmp_path), ScratchFolder("two", tmp_path)
    (one.path / "x").write_text("x")
    one.cleanup()
    one.cleanup()
    assert list(tmp_path.iterdir()) == [two.path]
    del two
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_room_is_really_there(tmp_path, size):
    reserve(tmp_path / "x", size)
    state = (tmp_path / "x").stat()
    assert state.st_size == size and state.st_blocks * 512 >= size


def test_a_disk_without_room_is_one_line_before_the_work(tmp_path):
    code = (
        "import pathlib, resource, signal, sys\n"
        "from ptq.files.scratch import reserve\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "reserve(pathlib.Path(sys.argv[1]) / 'x', 1 << 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "UserError" in done.stderr.splitlines()[-1] and "0.001 GB are needed there" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_names_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="are needed there.* are free: free some space, name another folder by TMPDIR"):
        reserve(tmp_path / "x", 10**9)
    assert list(tmp_path.iterdir()) == []
