"""What a sweep shows on the screen: a live table while it runs, a line a point where nobody watches, the sorted table at the end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ptq.report.plain import plain_console, printable
from ptq.sweep.status import DONE, FAILED, INTERRUPTED, OVER, PRUNED, REFUSED, RUNNING, WAITING
from ptq.sweep.table import Row, by_result

STYLES = {
    DONE: "green", RUNNING: "cyan", FAILED: "red", REFUSED: "yellow", INTERRUPTED: "magenta", WAITING: "dim", PRUNED: "dim"
}  # fmt: skip
MOST_LIVE = 20
"""Rows of the live table: a longer one would scroll."""


class Display:
    """Shows how a sweep is getting on; `expected` is the number of its points where not all of them are known yet."""

    def __init__(self, title: str, console: Console | None = None, expected: int | None = None):
        self.title, self.console, self.expected = printable(title), console or plain_console(), expected
        self._live: Live | None = None
        self._begun = time.monotonic()
        self._at_begin: int | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Shows a live table while the context lasts, where the output is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=4, transient=True) as self._live:
            yield
        self._live = None

    def update(self, rows: Sequence[Row]) -> None:
        """Shows how the points stand now."""
        over = sum(row.status.kind in OVER for row in rows)
        self._at_begin = over if self._at_begin is None else self._at_begin
        if self._live is not None:
            self._live.update(self._picture(rows, over))

    def ended(self, row: Row, over: int, of: int) -> None:
        """Tells of a point that has come to an end, where there is no live table."""
        if self._live is None:
            self.console.print(f"[{over}/{of}] point {row.number} {row.status.kind}: {describe(row)}")

    def left(self, over: int, of: int) -> float | None:
        """Returns the seconds that are left, by the mean of the points that have ended since the start; None before the first."""
        ended = over - (self._at_begin or 0)
        return None if ended <= 0 else (time.monotonic() - self._begun) / ended * (of - over)

    def _picture(self, rows: Sequence[Row], over: int) -> Group:
        done = [row for row in by_result(rows) if row.status.kind == DONE]
        busy = [row for row in rows if row.status.kind == RUNNING]
        wrong = [row for row in rows if row.status.kind in {FAILED, REFUSED, INTERRUPTED}]
        room = max(3, min(MOST_LIVE, self.console.height - 8) - len(busy))
        of = self.expected or len(rows)
        left = self.left(over, of)
        words = f"{over} of {of}" + (f", {span(left)} left" if left is not None else "")
        best = f"best so far: point {done[0].number}, {describe(done[0])}" if done else "no point has ended yet"
        head = Text(f"{self.title}   {words}\n{printable(best)}", no_wrap=True, overflow="ellipsis")
        shown = [*busy, *wrong[: room // 3], *done[: room - min(len(wrong), room // 3)]]
        return Group(head, ProgressBar(total=max(1, of), completed=over, width=40), table_of(shown))


def table_of(rows: Sequence[Row], title: str | None = None) -> Table:
    """Returns a table of rows, in their order."""
    table = Table(title=title, title_justify="left")
    table.add_column("point", justify="right", no_wrap=True)
    keys = list(dict.fromkeys(key for row in rows for key in row.options))
    for key in keys:
        table.add_column(printable(_short(key, keys)), overflow="fold")
    for name in ("perplexity", "difference and interval", "KL", "bits", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status")
    for row in rows:
        table.add_row(
            str(row.number), *(printable(row.options.get(key, "")) for key in keys), *_figures(row),
            Text(printable(row.status.kind + (f": {row.status.line}" if row.status.line else "")), STYLES[row.status.kind]),
        )  # fmt: skip
    return table


def describe(row: Row) -> str:
    """Returns a row in one line."""
    chosen = " ".join(f"{key}={value}" for key, value in row.options.items() if value)
    if row.status.kind == DONE:
        perplexity, interval, kl, bits, _ = _figures(row)
        return f"{chosen}: perplexity {perplexity} ({interval}), KL {kl}, {bits} bits"
    return f"{chosen}{': ' if chosen and row.status.line else ''}{row.status.line}"


def span(seconds: float) -> str:
    """Returns a time in its two greatest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _figures(row: Row) -> tuple[str, str, str, str, str]:
    f = row.figures

    def words(name: str, form: str) -> str:
        value = f[name]
        return "" if value is None else format(value, form)

    interval = (
        f"{words('difference', '+.4f')} [{words('difference_low', '+.4f')}, {words('difference_high', '+.4f')}]"
        if f["difference"] is not None
        else ""
    )
    seconds = "" if row.status.seconds is None else f"{row.status.seconds:.0f}"
    return (
        words("quantized_perplexity", ".4f"),
        interval,
        words("kl_mean", ".5f"),
        words("bits_per_weight", ".2f"),
        seconds,
    )


def _short(key: str, keys: Sequence[str]) -> str:
    """Returns the last parts of an option's name that tell it from the others."""
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        short = ".".join(parts[-count:])
        if sum(other == short or other.endswith(f".{short}") for other in keys) == 1:
            return short
    return key
