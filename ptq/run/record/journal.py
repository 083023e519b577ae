"""What a run tells: lines on the screen and in ``run.log``, progress with time left, seconds and memory by phase."""

import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ptq.network.block_stream import STEPS
from ptq.report.plain import plain_console
from ptq.run.record.peak_memory import BETWEEN, PeakMemory

EVERY = 30.0
"""Seconds between lines of progress where the output is no terminal."""


class Clock:
    """The time that a journal goes by."""

    def now(self) -> float:
        """Returns seconds since some moment."""
        return time.perf_counter()

    def wait(self, ended: threading.Event, seconds: float) -> bool:
        """Waits so many seconds, or until `ended` is set; returns whether it is."""
        return ended.wait(seconds)


class Journal:
    """Lines for people, and for the run's log file.

    On a terminal progress is shown by bars; elsewhere (a file, a pipe, a notebook) by a line every `EVERY` seconds.

    Attributes:
        path: the log file, or None.
        console: where lines are printed.
        seconds: how long each phase took, in order.
        memory: the most memory held, and in which phase.
        figures: told of figures by name: seconds of every phase that has ended, and those of the result.
    """

    def __init__(self, path: pathlib.Path | None = None, console: Console | None = None, clock: Clock | None = None):
        self.path = path
        self._clock = clock or Clock()
        self.console = console or _console()
        self.seconds: dict[str, float] = {}
        self.memory = PeakMemory()
        self.figures: Callable[[Mapping[str, float]], None] = lambda values: None
        self._pass: _Pass | None = None
        self._progress: Progress | None = None
        self._tasks: dict[str, int] = {}
        if path is not None:
            path.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        """Prints a line and appends it to the log."""
        self.console.print(text, markup=False, emoji=False)
        self.note(text)

    def note(self, text: str) -> None:
        """Appends a line to the log only."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    def show(self, table: Table) -> None:
        """Prints a table and appends it, as text, to the log."""
        self.console.print(table)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                plain_console(file, width=120, no_color=True).print(table)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase and watches its memory, with progress while it lasts."""
        start = self._clock.now()
        self.memory.note(BETWEEN)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not self.console.is_terminal
        try:
            with (
                Progress(*columns, console=self.console, transient=True, disable=hidden) as self._progress,
                self._lines(name) if hidden else nullcontext(),
            ):
                yield
        finally:
            self._progress, self._pass = None, None
            self._tasks.clear()
            self.memory.note(name)
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock.now() - start
        self.note(f"phase {name}: {self.seconds[name]:.2f} s")
        self.figures({f"seconds.{name}": self.seconds[name]})

    def progress(self, what: str, done: int, total: int) -> None:
        """Notes that `done` of `total` blocks of the pass `what` are done; made for `BlockStream`."""
        now = self._clock.now()
        if self._pass is None or self._pass.what != what:
            self._pass = _Pass(what, now, done)
        self._pass.done, self._pass.total = done, total
        if self._progress is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(TaskID(self._tasks[what]), completed=done)

    @contextmanager
    def _lines(self, name: str) -> Iterator[None]:
        """Prints where the phase `name` is every `EVERY` seconds, from a thread of its own: a block may take long."""
        ended, start = threading.Event(), self._clock.now()

        def tell() -> None:
            while not self._clock.wait(ended, EVERY):
                self.say(_standing(name, self._pass, self._clock.now(), start))

        thread = threading.Thread(target=tell, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@dataclass
class _Pass:
    """A pass under way: when its first block of this process was done, and which; how many are."""

    what: str
    since: float
    first: int
    done: int = 0
    total: int = 0


def _standing(phase: str, at: _Pass | None, now: float, start: float) -> str:
    """Returns where a phase is: its pass, blocks done, time, and time left where two blocks tell how long one takes."""
    seconds = now - start
    if at is None:
        return f"{phase}: {seconds:.0f} s"
    unit = STEPS if at.what == STEPS else "blocks"
    words = phase if at.what in {phase, STEPS} else f"{phase}, {at.what}"
    passed = at.done - at.first
    left = f", about {(now - at.since) / passed * (at.total - at.done):.0f} s left" if passed > 0 else ""
    return f"{words}: {at.done} of {at.total} {unit}, {seconds:.0f} s{left}"


def _console() -> Console:
    console = plain_console(sys.stdout)
    # A pipe has no width of its own: tables for files and logs are not squeezed into 80 columns.
    return console if console.is_terminal else plain_console(sys.stdout, width=140)
