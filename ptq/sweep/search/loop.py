"""The loop of a search: a point is asked for when there is room for one, run as any point of a sweep, and told of."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from ptq.errors import UserError
from ptq.files.atomic import ensure_folder
from ptq.files.lease import lease
from ptq.models.shared import Shared
from ptq.report.plain import printable
from ptq.run.experiment import run_folder
from ptq.sweep.board import Board
from ptq.sweep.display import Display, table_of
from ptq.sweep.launchers.base import Launcher, Task
from ptq.sweep.loop import check_points, forget
from ptq.sweep.points import Point, Sweep
from ptq.sweep.search.definition import Search
from ptq.sweep.search.front import front, write_front
from ptq.sweep.search.space import combinations
from ptq.sweep.search.study import Study
from ptq.sweep.status import DONE, FAILED, OVER, PRUNED, REFUSED, Status, launching, status_of, write_status
from ptq.sweep.table import Row

MOST_REPEATS = 50
"""Suggestions in a row that are points already, after which the sampler has nothing new to say."""
MOST_REFUSED = 10
"""Points after which a search ends when all of them were refused."""
Make = Callable[[int, Sequence[str]], Point]
"""Composes the point of a number and of what the space chose."""


@dataclass(frozen=True)
class SearchFinding:
    """What a search has come to: a row a point, those that no other beats, and why it ended before its trials, or ""."""

    rows: list[Row]
    front: list[Row]
    why: str

    @property
    def whole(self) -> bool:
        """Whether every point has ended, none by a failure."""
        return all(row.status.kind in OVER - {FAILED} for row in self.rows)


def run_search(
    search: Search, sweep: Sweep, launcher: Launcher, task: Task, jobs: int, make: Make, display: Display
) -> SearchFinding:
    """Runs a search, or what is missing of one.

    Args:
        search: what it is.
        sweep: with the points that it has got already, or none.
        launcher: who runs the points.
        task: what each is started with.
        jobs: points at once; the next is asked for when fewer are open.
        make: composes a point.
        display: shows how it is getting on.

    Raises:
        UserError: where the sampler cannot search this space, or all of the first points are refused.
    """
    ensure_folder(sweep.folder, "outputs")
    with lease(sweep.folder / "search.lease", print):
        search.write(sweep.folder)
        searching = _Searching(search, sweep, Study(sweep.folder, search), make, jobs, task.force, display)
        with launching(sweep.folder), display.showing():
            running = launcher.run(task, searching.numbers())
            try:
                for ended in running:
                    if ended is not None and ended.problem:
                        write_status(sweep.folder, ended.number, Status(FAILED, line=ended.problem))
                    searching.note(None if ended is None else ended.number)
            finally:
                if hasattr(running, "close"):
                    running.close()
                searching.board.refresh(True)
        return searching.finding()


def conclude(finding: SearchFinding, search: Search, display: Display) -> None:
    """Shows what a search has found: the front, what was refused or failed, and why it has ended."""
    names = search.options.objectives
    title = "no other point is better" if len(names) == 1 else "Pareto front"
    display.console.print(table_of(finding.front, f"{title} by {' and '.join(names)}"))
    for row in finding.rows:
        if row.status.kind in {FAILED, REFUSED}:
            chosen = " ".join(f"{key}={value}" for key, value in row.options.items() if value)
            display.console.print(Text(printable(f"point {row.number} {row.status.kind}: {chosen}: {row.status.line}")))
    kinds = [row.status.kind for row in finding.rows]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
    display.console.print(f"{counts}{f'; {finding.why}' if finding.why else ''}")


class _Searching:
    """A search under way."""

    def __init__(
        self, search: Search, sweep: Sweep, study: Study, make: Make, jobs: int, force: bool, display: Display
    ):
        self.search, self.study, self.make, self.jobs, self.force = search, study, make, jobs, force
        self.board = Board(sweep, display)
        self.why = ""
        self._shared = Shared()
        self._open: set[int] = set()
        self._chosen = {point.overrides: point.number for point in sweep.points}
        self._experiments = {self._experiment(p): p.number for p in reversed(sweep.points) if not p.refused}
        sweep.write()
        self.board.refresh(True)

    def numbers(self) -> Iterator[int | None]:
        """Yields the points to be run: first those that were left, then those that the study asks for."""
        for trial in self.study.lost():
            self.study.drop(trial)
        for point, row in zip(self.board.sweep.points, self.board.rows, strict=True):
            kind = row.status.kind
            if kind in {DONE, PRUNED, REFUSED} and not (self.force and kind == DONE):
                self._tell(point.number)
                continue
            forget(self.board.sweep.folder, point)
            yield from self._when_there_is_room()
            self._open.add(point.number)
            yield point.number
        size, repeats = combinations(self.search.space), 0
        while len(self.board.sweep.points) < self.search.trials:
            yield from self._when_there_is_room()
            if size is not None and len(self._chosen) >= size:
                self.why = f"the space has {size} points, and all were tried"
                return
            trial, overrides = self.study.ask()
            number, new = self._point_of(overrides)
            self.study.join(trial, number)
            repeats = 0 if new else repeats + 1
            if number not in self._open and not new:
                self._tell(number)
            elif new and status_of(self.board.sweep.folder, self.board.sweep.points[-1]).kind in OVER:
                self.note(number)
            elif new:
                self._open.add(number)
                yield number
            if repeats >= MOST_REPEATS:
                self.why = f"{MOST_REPEATS} suggestions in a row were points already"
                return

    def note(self, number: int | None) -> None:
        """Notes that a point has ended, or that time has passed."""
        self.board.refresh(number is not None, number)
        if number is not None:
            self._open.discard(number)
            self._tell(number)
            self._refuse_if_all_are_refused()

    def finding(self) -> SearchFinding:
        """Returns what has been found, and writes the front into the sweep's folder."""
        found = front(self.board.rows, self.search.options.objectives)
        write_front(self.board.sweep.folder, found)
        return SearchFinding(self.board.rows, found, self.why)

    def _when_there_is_room(self) -> Iterator[None]:
        while len(self._open) >= self.jobs:
            yield None

    def _point_of(self, overrides: tuple[str, ...]) -> tuple[int, bool]:
        """Returns the number of the point that `overrides` make, and whether it is new: then the sweep has got it."""
        if (known := self._chosen.get(overrides)) is not None:
            return known, False
        sweep = self.board.sweep
        number = len(sweep.points) + 1
        [point], finished = check_points((self.make(number, overrides),), self._shared, self.force)
        experiment = "" if point.refused else self._experiment(point)
        known = self._experiments.get(experiment) if experiment else None
        self._chosen[overrides] = known or number
        if known is not None:
            return known, False
        if experiment:
            self._experiments[experiment] = number
        for folder in finished.values():
            write_status(sweep.folder, number, Status(DONE, str(folder.absolute())))
        self.board.sweep = dataclasses.replace(sweep, points=(*sweep.points, point))
        self.board.sweep.write()
        self.board.refresh(True)
        return number, True

    def _experiment(self, point: Point) -> str:
        return "" if point.recipe is None else str(run_folder(point.recipe))

    def _tell(self, number: int) -> None:
        rows = self.board.rows
        if len(rows) < number:
            self.board.refresh(True)
        row = self.board.rows[number - 1]
        values = [row.figure(name) for name in self.search.options.objectives]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        known = row.status.kind == DONE and len(finite) == len(values)
        self.study.tell(number, finite if known else None, row.status.kind == PRUNED)

    def _refuse_if_all_are_refused(self) -> None:
        rows = self.board.rows
        if len(rows) >= MOST_REFUSED and all(row.status.kind == REFUSED for row in rows):
            raise UserError(f"all of the first {len(rows)} points are refused: {rows[-1].status.line}")
