"""The rows of a sweep as they stand while it runs: on the screen and in the sweep's files."""

import time

from ptq.sweep.display import Display
from ptq.sweep.points import Sweep
from ptq.sweep.status import OVER
from ptq.sweep.table import Row, rows_of, write_table

TABLE_SECONDS = 2.0
"""How often the files of the table are written where points do not end in between."""


class Board:
    """Keeps the rows of `sweep`, which may get more points.

    Attributes:
        sweep: as it is now.
        display: the screen.
        rows: as they stood when they were last read.
    """

    def __init__(self, sweep: Sweep, display: Display):
        self.sweep, self.display = sweep, display
        self.rows: list[Row] = []
        self._written = 0.0

    def refresh(self, now: bool, ended: int | None = None) -> None:
        """Reads and shows the rows: at once, or when it is time; `ended` is the number of a point that has come to an end."""
        if now or time.monotonic() - self._written > TABLE_SECONDS:
            self.rows = rows_of(self.sweep)
            write_table(self.sweep.folder, self.rows)
            self._written = time.monotonic()
        self.display.update(self.rows)
        if ended is not None:
            over = sum(row.status.kind in OVER for row in self.rows)
            self.display.ended(self.rows[ended - 1], over, self.display.expected or len(self.rows))
