"""Where each point of a sweep stands: one small file a point, written by whoever works on it."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from ptq.errors import UserError
from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json
from ptq.files.lease import is_held, lease
from ptq.files.scratch import this_host
from ptq.run.experiment import run_folder
from ptq.sweep.points import Point

WAITING, RUNNING, DONE, FAILED, REFUSED, INTERRUPTED = "waiting", "running", "done", "failed", "refused", "interrupted"
LAUNCHERS = "launchers"
"""Folder of the leases of processes that start points, one each."""
PRUNED = "pruned"
"""Ended after a few windows, which show that another point is better."""
OVER = frozenset({DONE, FAILED, REFUSED, PRUNED})
"""The kinds of points that have come to an end."""


@dataclass(frozen=True)
class Status:
    """Where a point stands.

    Attributes:
        kind: waiting, running, done, failed, refused, interrupted or pruned.
        folder: of its run, where there is one.
        line: why it failed, was refused or pruned, or "".
        seconds: how long it took where it ran in this sweep, else None.
    """

    kind: str
    folder: str = ""
    line: str = ""
    seconds: float | None = None


@contextmanager
def launching(sweep: pathlib.Path) -> Iterator[None]:
    """Inside the context others see by `is_launched` that this process starts points of the sweep in the folder `sweep`."""
    with lease(sweep / LAUNCHERS / f"{this_host()}-{os.getpid()}.lease"):
        yield


def is_launched(sweep: pathlib.Path) -> bool:
    """Returns whether some live process starts points of the sweep in the folder `sweep`, or waits for them in a queue."""
    return any(is_held(path) for path in (sweep / LAUNCHERS).glob("*.lease"))


def write_status(sweep: pathlib.Path, number: int, status: Status) -> None:
    """Writes where a point stands."""
    write_text(_file(sweep, number), json.dumps(asdict(status)) + "\n")


def status_of(sweep: pathlib.Path, point: Point) -> Status:
    """Returns where a point stands; one that was running while its process died is interrupted."""
    if point.refused or point.recipe is None:
        return Status(REFUSED, line=point.refused)
    try:
        found = parse_json(_file(sweep, point.number).read_text(encoding="utf-8"))
        status = Status(**found)
    except (OSError, ValueError, TypeError):
        return Status(WAITING)
    if status.kind == RUNNING and not is_held(pathlib.Path(f"{status.folder}.lease")):
        return Status(INTERRUPTED, status.folder, "its process has ended: ptq sweep resume takes it up")
    return status


def lease_of(point: Point) -> pathlib.Path:
    """Returns the lease of a point's run, beside the run's folder: the same one for every sweep that has this point.

    Raises:
        UserError: for a refused point, which has no run.
    """
    if point.recipe is None:
        raise UserError(point.refused)
    return pathlib.Path(f"{run_folder(point.recipe).absolute()}.lease")


def log_of(sweep: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the file that holds what a point's run prints."""
    return sweep / "points" / f"{number:05d}.log"


def metrics_of(status: Status) -> Mapping[str, object] | None:
    """Returns what the metrics.json of a point's run holds, None where there is none that can be read."""
    try:
        found = parse_json((pathlib.Path(status.folder) / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _file(sweep: pathlib.Path, number: int) -> pathlib.Path:
    return sweep / "points" / f"{number:05d}.json"
