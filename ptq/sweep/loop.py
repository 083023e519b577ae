"""The loop over a sweep's points: all checked first, what is finished taken, the rest launched, one table that grows."""

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.errors import UserError
from ptq.files.atomic import ensure_folder
from ptq.models.shared import Shared
from ptq.run.experiment import check_recipe, finished_before, run_folder
from ptq.sweep.board import Board
from ptq.sweep.display import Display, table_of
from ptq.sweep.launchers.base import Launcher, Task
from ptq.sweep.lending import forget_lent, in_turn
from ptq.sweep.points import Point, Sweep
from ptq.sweep.status import DONE, FAILED, INTERRUPTED, OVER, WAITING, Status, launching, status_of, write_status
from ptq.sweep.table import Row, by_result, without_effect


@dataclass(frozen=True)
class Finding:
    """What has become of a sweep: its folder and a row a point."""

    folder: pathlib.Path
    rows: list[Row]

    @property
    def whole(self) -> bool:
        """Whether every point is done."""
        return all(row.status.kind == DONE for row in self.rows)


def check_points(
    points: Sequence[Point], shared: Shared, force: bool = False
) -> tuple[tuple[Point, ...], dict[int, pathlib.Path]]:
    """Checks every point without running it; one that cannot run becomes a refused one, whatever it was before.

    Returns:
        The points, and the folders of those that are finished by number, which have passed their checks already.
    """
    finished: dict[int, pathlib.Path] = {}
    done: list[Point] = []
    seen: dict[tuple[str, str], Point] = {}
    for point in points:
        recipe = point.recipe
        if recipe is not None:
            try:
                point = dataclasses.replace(point, refused="")
                experiment = (recipe.name, run_folder(recipe).name)
                _refuse_repeated(point, seen.setdefault(experiment, point))
                folder = None if force else finished_before(recipe, shared)
                if folder is None:
                    check_recipe(recipe, shared)
                else:
                    finished[point.number] = folder
            except UserError as error:
                point = dataclasses.replace(point, refused=" ".join(str(error).split()))
        done.append(point)
    return tuple(done), finished


def _refuse_repeated(point: Point, first: Point) -> None:
    """Raises `UserError` for a point that is the experiment of an earlier one: what tells them apart has no effect."""
    if first is not point:
        other = [o for o in point.overrides if o not in first.overrides] or list(point.overrides)
        raise UserError(
            f"{' '.join(other)}: the same experiment as point {first.number}: it has no effect here, leave it out"
        )


def run_sweep(
    sweep: Sweep,
    launcher: Launcher,
    task: Task,
    finished: dict[int, pathlib.Path],
    display: Display,
    jobs: int = 1,
) -> Finding:
    """Runs what is missing of a sweep, and keeps its table up to date meanwhile.

    Args:
        sweep: checked by `check_points`.
        launcher: who runs the points.
        task: what each is started with.
        finished: folders of points that are done already, by number.
        display: shows how it is getting on.
        jobs: how many points the launcher runs at once.
    """
    ensure_folder(sweep.folder, "outputs")
    sweep.write()
    for number, folder in finished.items():
        before = status_of(sweep.folder, sweep.points[number - 1])
        if before.kind != DONE or before.folder != str(folder.absolute()):
            write_status(sweep.folder, number, Status(DONE, str(folder.absolute())))
    todo = [p for p in sweep.points if not p.refused and p.number not in finished]
    for point in todo:
        forget(sweep.folder, point)
    board = Board(sweep, display)
    board.refresh(True)
    try:
        with launching(sweep.folder), display.showing():
            running = launcher.run(task, [p.number for p in in_turn(_by_model(todo), jobs)])
            try:
                for ended in running:
                    if ended is not None and ended.problem:
                        write_status(sweep.folder, ended.number, Status(FAILED, line=ended.problem))
                    board.refresh(ended is not None, None if ended is None else ended.number)
            finally:
                if hasattr(running, "close"):
                    running.close()
    finally:
        board.refresh(True)
    if all(row.status.kind in OVER for row in board.rows):
        forget_lent(sweep.folder)
    return Finding(sweep.folder, board.rows)


def conclude(finding: Finding, display: Display) -> None:
    """Shows the table of a sweep that has ended, the best point first, and what is to be said of it."""
    rows = by_result(finding.rows)
    display.console.print(table_of([row for row in rows if row.status.kind == DONE], display.title))
    for row in finding.rows:
        if row.status.kind != DONE:
            display.console.print(f"point {row.number} {row.status.kind}: {_words(row)}")
    for key in without_effect(finding.rows):
        display.console.print(f"{key}: made no difference to any figure")
    counts = {kind: sum(row.status.kind == kind for row in rows) for kind in dict.fromkeys(r.status.kind for r in rows)}
    display.console.print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    display.console.print(f"results: {finding.folder}")


def forget(folder: pathlib.Path, point: Point) -> None:
    """Forgets how a point of the sweep in `folder` ended before, unless some process is at work on it now."""
    if status_of(folder, point).kind in {*OVER, INTERRUPTED}:
        write_status(folder, point.number, Status(WAITING))


def _by_model(points: Sequence[Point]) -> list[Point]:
    """Returns points with those of one model and device together, for the load that they share."""
    groups: dict[object, list[Point]] = {}
    for point in points:
        if point.recipe is not None:
            groups.setdefault((point.recipe.model, point.recipe.execution), []).append(point)
    return [point for group in groups.values() for point in group]


def _words(row: Row) -> str:
    chosen = " ".join(f"{key}={value}" for key, value in row.options.items() if value)
    return f"{chosen}: {row.status.line}" if chosen and not row.status.line.startswith(chosen) else row.status.line
