"""The store: an entry is what was written, or it is made again and that is said."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ptq.errors import UserError
from ptq.files.manifest import MANIFEST
from ptq.files.scratch import scratch_path
from ptq.files.store import Store
from ptq.files.store_upkeep import collect, damage_of, entries

KEY = {"a": 1}


def write(path):
    save_file({"x": torch.ones(100)}, path)


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    return Store(tmp_path, said.append)


def test_an_entry_is_found_again_by_an_equal_key_only(store, said):
    key = {"a": 1, "b": "x"}
    assert store.find("kind", key) is None
    path = store.add("kind", key, write)
    assert store.find("kind", {"b": "x", "a": 1}) == path and load_file(path)["x"].sum() == 100
    assert store.find("kind", {"a": 2, "b": "x"}) is None and store.find("other", key) is None
    assert said == []


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_an_entry_is_noticed(at, bit, tmp_path_factory):
    said = []
    store = Store(tmp_path_factory.mktemp("store"), said.append)
    path = store.add("kind", KEY, write)
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)
    assert store.find("kind", KEY) is None and len(said) == 1
    assert store.add("kind", KEY, write) == path and store.find("kind", KEY) == path


def to_fifo(path):
    path.unlink()
    os.mkfifo(path)


def to_folder(path):
    path.unlink()
    path.mkdir()


def to_link(path):
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def entry_to(make):
    def harm(path):
        entry = path.parent
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
        make(entry)

    return harm


def another_kind(path):
    entry = path.parent
    other = entry.parent.with_name("other")
    other.mkdir()
    entry.rename(other / entry.name)
    content = json.loads((other / entry.name / MANIFEST).read_text())
    assert content["kind"] == "kind"
    (other / entry.name).rename(entry)
    content["kind"] = "other"
    (entry / MANIFEST).write_text(json.dumps(content))


HARMS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a FIFO": to_fifo,
    "a folder": to_folder,
    "a link": to_link,
    "one file more": lambda path: (path.parent / "more").write_text(""),
    "no manifest": lambda path: (path.parent / MANIFEST).unlink(),
    "manifest cut": lambda path: (path.parent / MANIFEST).write_text("{"),
    "manifest no mapping": lambda path: (path.parent / MANIFEST).write_text("[]"),
    "manifest nested deeply": lambda path: (path.parent / MANIFEST).write_text("[" * 100000),
    "manifest a FIFO": lambda path: to_fifo(path.parent / MANIFEST),
    "manifest a folder": lambda path: to_folder(path.parent / MANIFEST),
    "manifest of another kind": another_kind,
    "the entry a file": entry_to(lambda entry: entry.write_text("")),
    "the entry a FIFO": entry_to(os.mkfifo),
    "the entry a loop": entry_to(lambda entry: entry.symlink_to(entry)),
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_entry_that_was_harmed_is_made_again_and_said(store, said, tmp_path, harm):
    path = store.add("kind", KEY, write)
    HARMS[harm](path)
    store = Store(tmp_path, said.append)
    assert store.find("kind", KEY) is None
    [line] = said
    assert line.startswith(f"store: an entry of kind in {tmp_path} is damaged (") and "made again" in line
    assert [e.damage or damage_of(e) for e in entries(store)] != [None]
    assert store.add("kind", KEY, write) == path and store.find("kind", KEY) == path and len(said) == 1
    assert [p.name for p in (tmp_path / "kind").iterdir()] == [path.parent.name]


def test_an_entry_that_may_not_be_read_is_made_again(store, said, monkeypatch):
    path = store.add("kind", KEY, write)
    opened = os.open

    def refused(name, *rest, **more):
        if pathlib.Path(name).name == path.name:
            raise PermissionError(13, "Permission denied")
        return opened(name, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    assert store.find("kind", KEY) is None and "Permission denied" in said[0]
    monkeypatch.undo()
    assert store.add("kind", KEY, write) == path and store.find("kind", KEY) == path


def test_a_kept_folder_is_filled_once_and_again_when_harmed(store, said):
    filled = []

    def fill(folder):
        filled.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("a" * 1000)

    folder = store.keep("kind", KEY, fill)
    assert store.keep("kind", KEY, fill) == folder and len(filled) == 1
    (folder / "deep" / "a").write_text("a" * 999 + "b")
    assert (store.keep("kind", KEY, fill) / "deep" / "a").read_text() == "a" * 1000
    assert len(filled) == 2 and "deep/a is not what was written" in said[0]


def test_an_entry_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(store, tmp_path):
    path = store.add("kind", KEY, write)

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "no")

    with pytest.raises(UserError, match="the disk is full"):
        store.add("kind", KEY, fail)
    assert store.find("kind", KEY) == path and len(list((tmp_path / "kind").iterdir())) == 1


def test_what_killed_processes_left_in_a_store_is_swept_and_what_live_ones_write_is_not(store, tmp_path):
    path = store.add("kind", KEY, write)
    live = scratch_path(path.parents[1], "x")
    dead = live.with_name(live.name.replace(f"-{os.getpid()}-", "-4194305-"))  # beyond the greatest number of a process
    for folder in (live, dead):
        folder.mkdir()
    store.sweep()
    assert live.exists() and not dead.exists() and store.find("kind", KEY) == path


def three(tmp_path):
    """A store with three entries, the second used last and the first used longest ago, in bytes each."""
    store = Store(tmp_path)
    paths = [store.add("kind", {"n": n}, write, f"about {n}").parent for n in range(3)]
    for path, used in zip(paths, (100, 300, 200), strict=True):
        os.utime(path / MANIFEST, (used, used))
    return paths


def test_what_was_used_least_recently_goes_first_and_no_more_than_needed(tmp_path):
    one, two, three_ = three(tmp_path)
    listed = entries(Store(tmp_path))
    assert [e.path for e in listed] == [one, three_, two] and [e.about for e in listed] == [
        "about 0",
        "about 2",
        "about 1",
    ]
    size = listed[0].bytes
    assert collect(Store(tmp_path), 3 * size + 10) == ([], [])
    gone, busy = collect(Store(tmp_path), 2 * size + 10)
    assert [e.path for e in gone] == [one] and busy == [] and not one.exists() and two.exists() and three_.exists()
    assert Store(tmp_path).find("kind", {"n": 2}) and collect(Store(tmp_path), size + 10)[0][0].path == two


def test_damaged_entries_and_those_of_earlier_versions_go_before_the_others(tmp_path):
    one, two, three_ = three(tmp_path)
    (two / "entry.safetensors").unlink()
    (two / MANIFEST).write_text("{")
    earlier = tmp_path / "baseline" / f"{'0' * 24}.safetensors"
    earlier.parent.mkdir()
    earlier.write_bytes(bytes(1000))
    kept = tmp_path / "baseline" / "mine.txt"
    kept.write_text("")
    sizes = {e.path: e.bytes for e in entries(Store(tmp_path))}
    gone, _ = collect(Store(tmp_path), sizes[one] + sizes[three_])
    assert {e.path for e in gone} == {two, earlier} and one.exists() and three_.exists() and kept.exists()
    assert len(collect(Store(tmp_path), 0)[0]) == 2 and kept.exists()


def test_an_entry_in_use_by_a_live_process_is_left_and_goes_when_the_process_has_ended(tmp_path):
    one, *_ = three(tmp_path)
    code = (
        "import pathlib, sys\n"
        "from ptq.files.store import Store\n"
        "store = Store(pathlib.Path(sys.argv[1]))\n"
        "print(store.find('kind', {'n': 0}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline().decode().strip() == str(one / "entry.safetensors")
        gone, busy = collect(Store(tmp_path), 0)
        assert [e.path for e in busy] == [one] and len(gone) == 2 and damage_of(busy[0]) is None
    finally:
        process.kill()
        process.communicate()
    assert [e.path for e in collect(Store(tmp_path), 0)[0]] == [one] and entries(Store(tmp_path)) == []


def test_a_store_that_has_made_an_entry_holds_it_while_it_lives(tmp_path):
    store = Store(tmp_path)
    store.add("kind", KEY, write)
    assert len(collect(Store(tmp_path), 0)[1]) == 1
    del store
    assert len(collect(Store(tmp_path), 0)[0]) == 1


def test_two_processes_that_make_one_entry_at_once_leave_one_whole(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from ptq.files.store import Store\n"
        "for n in range(40):\n"
        "    store = Store(pathlib.Path(sys.argv[1]))\n"
        "    store.add('kind', {'n': n % 2}, lambda path: path.write_bytes(bytes(1000)))\n"
        "    folder = store.keep('folder', {'n': n}, lambda folder: (folder / 'x').write_bytes(bytes(1000)))\n"
        "    assert (folder / 'x').read_bytes() == bytes(1000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    told = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    found = entries(Store(tmp_path))
    assert len(found) == 42 and [damage_of(e) for e in found] == [None] * 42
    assert not [p for p in tmp_path.rglob(".*")]


def test_an_entry_is_being_made_while_a_live_process_holds_its_lease_and_it_is_not_there(tmp_path):
    store, key = Store(tmp_path), {"n": 1}
    assert not store.being_made("kind", key)
    with store.found_or_mine("kind", key) as found:
        assert found is None and store.being_made("kind", key) and not store.being_made("kind", {"n": 2})
        store.add("kind", key, write)
        assert not store.being_made("kind", key)
    code = (
        "import os, pathlib, sys\n"
        "from ptq.files.store import Store\n"
        "with Store(pathlib.Path(sys.argv[1])).found_or_mine('kind', {'n': 3}):\n"
        "    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.glob("kind/*.lease")) and not store.being_made("kind", {"n": 3})
