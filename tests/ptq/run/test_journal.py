"""Progress where the output is no terminal: a line every thirty seconds, and none before."""

import io
import queue
import threading

from rich.console import Console

from ptq.run.record.journal import EVERY, Clock, Journal


class Stopped(Clock):
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.time = 0.0
        self.asked: queue.Queue[float] = queue.Queue()
        self.passed = threading.Semaphore(0)

    def now(self) -> float:
        return self.time

    def wait(self, ended: threading.Event, seconds: float) -> bool:
        self.asked.put(seconds)
        while not self.passed.acquire(timeout=0.01):
            if ended.is_set():
                return True
        self.time += seconds
        return ended.is_set()

    def go_on(self) -> float:
        """Lets the wait that is under way end; returns how long it was, once the next has begun."""
        waited = self.asked.get(timeout=60)
        self.passed.release()
        self.asked.put(self.asked.get(timeout=60))
        return waited


def test_a_redirected_run_tells_every_thirty_seconds_how_far_it_is(tmp_path):
    screen, clock = io.StringIO(), Stopped()
    journal = Journal(tmp_path / "run.log", Console(file=screen, width=140), clock)
    with journal.phase("load"):
        pass
    clock.asked.get(timeout=60)
    assert screen.getvalue() == "" and EVERY == 30.0
    with journal.phase("quantize"):
        journal.progress("quantize", 0, 12)
        assert clock.go_on() == 30.0
        journal.progress("quantize", 3, 12)
        assert clock.go_on() == 30.0
        journal.progress("quantize", 6, 12)
        clock.go_on()
    lines = screen.getvalue().splitlines()
    assert lines == [
        "quantize: 0 of 12 blocks, 30 s",
        "quantize: 3 of 12 blocks, 60 s, about 180 s left",
        "quantize: 6 of 12 blocks, 90 s, about 90 s left",
    ]
    assert journal.seconds["quantize"] == 90.0
    log = (tmp_path / "run.log").read_text()
    assert all(line in log for line in lines)


def test_on_a_terminal_progress_writes_no_lines():
    screen, clock = io.StringIO(), Stopped()
    journal = Journal(None, Console(file=screen, force_terminal=True), clock)
    with journal.phase("quantize"):
        journal.progress("quantize", 1, 2)
    assert clock.asked.empty() and "blocks," not in screen.getvalue()
