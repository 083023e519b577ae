"""Leases: one process works while others wait, and a dead holder's lease is taken over."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ptq.files import lease as module
from ptq.files.lease import lease
from ptq.files.store import Store

HOLDER = textwrap.dedent("""
    import pathlib, sys, time
    from ptq.files.lease import lease
    with lease(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
""")


def holder(path, seconds):
    """Another process that holds the lease; returned when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_that_is_free_is_taken_at_once_and_given_back(tmp_path):
    with lease(tmp_path / "kind" / "x.lease") as waited:
        assert not waited
        assert json.loads((tmp_path / "kind" / "x.lease").read_text())["pid"] == os.getpid()
    assert list((tmp_path / "kind").iterdir()) == []


def test_a_second_process_waits_for_the_first_and_is_told_of_it(tmp_path):
    path, said = tmp_path / "x.lease", []
    process = holder(path, 1.0)
    begun = time.monotonic()
    with lease(path, said.append) as waited:
        assert waited
    assert time.monotonic() - begun > 0.5
    assert said == [f"waiting for process {process.pid}, which is computing this"]
    process.wait()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path):
    process = holder(tmp_path / "x.lease", 600)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begun = time.monotonic()
    with lease(tmp_path / "x.lease") as waited:
        assert not waited
    assert time.monotonic() - begun < 2


def test_a_holder_on_another_machine_lives_by_its_heartbeat(tmp_path, monkeypatch):
    path = tmp_path / "x.lease"
    path.write_text(json.dumps({"host": "another", "pid": 1, "start": 1, "token": "t"}))
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)
    begun = time.monotonic()
    with lease(path) as waited:
        assert waited
    assert time.monotonic() - begun > 0.8


def test_a_holder_that_beats_is_not_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.5)
    path, taken = tmp_path / "x.lease", []

    def wait():
        # Seen as from another machine: only the heartbeat tells that the holder lives.
        with monkeypatch.context() as patch:
            patch.setattr(module, "this_host", lambda: "another")
            with lease(path):
                taken.append(time.monotonic())

    with lease(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.2)
        ended = time.monotonic()
        assert taken == []
    thread.join()
    assert taken[0] >= ended


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_lease_is_waited_for_until_it_is_stale(tmp_path, content, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 0.3)
    (tmp_path / "x.lease").write_text(content)
    with lease(tmp_path / "x.lease") as waited:
        assert waited


def test_threads_that_want_one_entry_compute_it_once(tmp_path):
    made = []

    def want():
        with Store(tmp_path).found_or_mine("kind", {"a": 1}) as found:
            if found is None:
                time.sleep(0.3)
                made.append(1)
                Store(tmp_path).add("kind", {"a": 1}, lambda path: path.write_text("x"))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert [path.name for path in (tmp_path / "kind").iterdir() if "lease" in path.name] == []
