"""The page of a sweep, its table beside it: made once, or again and again while the sweep runs."""

import itertools
import pathlib
import shlex
from collections.abc import Sequence

from ptq.files.atomic import write_text
from ptq.report.page.build import build_page
from ptq.report.page.content import PageInput, PointOfPage, SearchOfPage
from ptq.sweep.points import Point, Sweep, read_sweep, split
from ptq.sweep.search.definition import Search, read_search
from ptq.sweep.search.front import front
from ptq.sweep.status import RUNNING, WAITING, is_launched
from ptq.sweep.table import Row, rows_of, write_table

PAGE = "report.html"
_ALONE = {"-m", "--multirun", "--zip", "--force", "--dry-run"}
_WITH_VALUE = {"--jobs", "--threads", "--launcher"}


def write_page(
    folder: pathlib.Path, output: pathlib.Path | None = None, refresh: int | None = None
) -> tuple[pathlib.Path, bool]:
    """Writes the page of the sweep in `folder`, and its table anew.

    Args:
        folder: of the sweep.
        output: the page's file; None for ``report.html`` in the sweep's folder.
        refresh: seconds after which the page loads itself again, while the sweep runs; None for never.

    Returns:
        The page's file, and whether some process is still at work on a point, or starts those that wait.

    Raises:
        UserError: when there is no sweep, or it is damaged.
    """
    sweep = read_sweep(folder)
    search = read_search(folder)
    rows = rows_of(sweep)
    write_table(folder, rows)
    running = any(row.status.kind == RUNNING for row in rows)
    open_ = running or (any(row.status.kind == WAITING for row in rows) and is_launched(folder))
    points = [
        PointOfPage(row.flat(), row.options, command_of(sweep, point, search))
        for row, point in zip(rows, sweep.points, strict=True)
    ]
    page = PageInput(
        sweep.name, str(folder.absolute()), shlex.join(sweep.command), sweep.keys, points, refresh if open_ else None,
        None if search is None else _of_search(search, rows, points)
    )  # fmt: skip
    path = output or folder / PAGE
    write_text(path, build_page(page))
    return path, open_


def command_of(sweep: Sweep, point: Point, search: Search | None = None) -> str:
    """Returns the command line that runs one point by itself: the sweep's, with the point's values for the swept options.

    A point of a search has the search's recipe and overrides too.
    """
    if search is not None:
        program = itertools.takewhile(lambda word: not word.startswith("-") and "=" not in word, sweep.command)
        return shlex.join([*program, "--config", search.recipe, *search.overrides, *point.overrides])
    done: list[str] = []
    for word in _plain(sweep.command):
        key = split(word.lstrip("+"))[0]
        if key in sweep.keys and ("=" in word or word.startswith("~")):
            continue
        done.append(word)
    return shlex.join([*done, *point.overrides])


def _of_search(search: Search, rows: Sequence[Row], points: Sequence[PointOfPage]) -> SearchOfPage:
    o = search.options
    pruned = f", pruned after {o.prune} windows" if o.prune is not None else ""
    about = f"{search.trials} points chosen by {o.sampler}, seed {o.seed}, for {' and '.join(o.objectives)}{pruned}"
    best = [points[row.number - 1] for row in front(rows, o.objectives)]
    return SearchOfPage(about, o.objectives, best)


def _plain(command: Sequence[str]) -> list[str]:
    """Returns the words of a command line without those that are for sweeps."""
    done: list[str] = []
    words = iter(command)
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif word not in _ALONE and not word.startswith(("launcher.", *(f"{name}=" for name in _WITH_VALUE))):
            done.append(word)
    return done
