"""Points of a sweep that quantize the same blocks: the first lends them, in the sweep's folder, until the last has ended."""

import pathlib
import shutil
from collections.abc import Sequence

from ptq.errors import UserError
from ptq.files.store import Store
from ptq.models.shared import Shared
from ptq.run.experiment import blocks_of
from ptq.sweep.points import Point, Sweep
from ptq.sweep.status import OVER, status_of

FOLDER = "blocks"
"""Folder of a sweep with what its points lend each other."""


def lent_to(sweep: Sweep, point: Point, shared: Shared) -> Store | None:
    """Returns where points that quantize the blocks of this one find them; None where none has lent them and none will want them."""
    name = _names(sweep, shared).get(point.number)
    if name is None:
        return None
    folder = sweep.folder / FOLDER / name
    return Store(folder) if folder.is_dir() or _awaited(sweep, point, shared) else None


def give_up(sweep: Sweep, point: Point, lent: Store, shared: Shared) -> None:
    """Removes what was lent to this point, whose work has ended, where no other waits for it."""
    if not _awaited(sweep, point, shared):
        shutil.rmtree(lent.folder, ignore_errors=True)


def forget_lent(folder: pathlib.Path) -> None:
    """Removes what the points of the sweep in `folder` have lent each other."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def blocks_of_points(points: Sequence[Point]) -> dict[int, str]:
    """Returns `blocks_of` by number of the point, for those that lend."""
    found: dict[int, str] = {}
    for point in points:
        if point.recipe is not None and not point.refused:
            try:
                name = blocks_of(point.recipe)
            except UserError:  # the point itself will say so
                continue
            if name is not None:
                found[point.number] = name
    return found


def in_turn(points: Sequence[Point], jobs: int) -> list[Point]:
    """Returns points in the order in which `jobs` at once wait least for blocks that another lends, and few blocks are kept at a time.

    Points are taken by as many groups of equal blocks as there are jobs: the first of each, then the others.
    """
    names = blocks_of_points(points)
    groups: dict[object, list[Point]] = {}
    for point in points:
        groups.setdefault(names.get(point.number, point.number), []).append(point)
    found, waiting = [], list(groups.values())
    while waiting:
        together, waiting = waiting[:jobs], waiting[jobs:]
        found += [group[0] for group in together] + [point for group in together for point in group[1:]]
    return found


def _names(sweep: Sweep, shared: Shared) -> dict[int, str]:
    """Returns `blocks_of_points` of the sweep, found once by a process: all its points are asked for each of them."""
    found: dict[int, str] = shared.once(
        ("blocks", sweep.folder, len(sweep.points)), lambda: blocks_of_points(sweep.points)
    )
    return found


def _awaited(sweep: Sweep, point: Point, shared: Shared) -> bool:
    """Whether another point that is yet to end quantizes the blocks of this one."""
    names = _names(sweep, shared)
    alike = [p for p in sweep.points if p.number != point.number and names.get(p.number) == names[point.number]]
    return any(status_of(sweep.folder, p).kind not in OVER for p in alike)
