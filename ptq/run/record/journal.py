"""What a run tells: lines on the screen and in ``run.log``, progress bars with time left, seconds per phase."""

import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from ptq.report.plain import plain_console


class Journal:
    """Lines for people, and for the run's log file. `seconds` holds how long each phase took, in order."""

    def __init__(self, path: pathlib.Path | None = None, console: Console | None = None):
        self.path = path
        self.console = console or _console()
        self.seconds: dict[str, float] = {}
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
        """Times a phase, with progress bars while it lasts."""
        start = time.perf_counter()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        try:
            hidden = not self.console.is_terminal
            with Progress(*columns, console=self.console, transient=True, disable=hidden) as self._progress:
                yield
        finally:
            self._progress = None
            self._tasks.clear()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.note(f"phase {name}: {self.seconds[name]:.2f} s")

    def progress(self, what: str, done: int, total: int) -> None:
        """Moves the bar `what`; made for `BlockStream`."""
        if self._progress is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(TaskID(self._tasks[what]), completed=done)


def _console() -> Console:
    console = plain_console(sys.stdout)
    # A pipe has no width of its own: tables for files and logs are not squeezed into 80 columns.
    return console if console.is_terminal else plain_console(sys.stdout, width=140)
