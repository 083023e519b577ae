"""The work on one point, in whatever process or machine a launcher starts it."""

import contextlib
import functools
import os
import pathlib
import time
import traceback

from ptq.errors import UserError
from ptq.files.atomic import ensure_folder
from ptq.files.lease import lease
from ptq.models.shared import Shared
from ptq.run.experiment import run_recipe
from ptq.sweep.lending import give_up, lent_to
from ptq.sweep.points import Point, Sweep, read_sweep
from ptq.sweep.pruning import pruned
from ptq.sweep.resources import threads_set
from ptq.sweep.status import DONE, FAILED, INTERRUPTED, RUNNING, Status, lease_of, log_of, write_status


@functools.cache
def shared_of_process() -> Shared:
    """Returns what all points in this process share; made with the first."""
    return Shared()


def work_on(folder: str, number: int, threads: int, force: bool = False, room: int = 0) -> str:
    """Runs one point of the sweep in `folder` and writes where it stands. Returns the kind of its status.

    Its mistakes and failures become its status; only what ends the process (Ctrl-C, a signal) goes through.

    Args:
        folder: of the sweep.
        number: of the point.
        threads: of the arithmetic.
        force: run it again although it is finished.
        room: bytes that this process may keep of what it computes of a model, for its next points.
    """
    sweep = read_sweep(pathlib.Path(folder))
    point = next(p for p in sweep.points if p.number == number)
    # Relative paths in recipes mean the folder that the sweep was started in, wherever a launcher starts this.
    shared_of_process().room = room
    with contextlib.chdir(sweep.cwd), threads_set(threads):
        return run_point(sweep, point, shared_of_process(), force).kind


def run_point(sweep: Sweep, point: Point, shared: Shared, force: bool = False) -> Status:
    """Runs a point, what it prints going to its log. Returns its status, which is written as well.

    Another process that works on the same experiment, for whichever sweep, is waited for: its result is taken then.
    """
    folder = sweep.folder
    log = log_of(folder, point.number)
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        place = lease_of(point)
        ensure_folder(place.parent, "outputs")
        with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), lease(place, print) as waited:
            write_status(folder, point.number, Status(RUNNING, str(place.with_suffix(""))))
            status = _run(sweep, point, shared, force and not waited)
    except (KeyboardInterrupt, SystemExit):
        line = "interrupted: ptq sweep resume takes it up"
        write_status(folder, point.number, Status(INTERRUPTED, line=line))
        raise
    except UserError as error:
        status = Status(FAILED, line=" ".join(str(error).split()))
    except Exception as error:
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        reason = " ".join(str(error).split())
        status = Status(FAILED, line=f"{type(error).__name__}{': ' if reason else ''}{reason}: see {log}")
    status = Status(status.kind, status.folder, status.line, round(time.monotonic() - begun, 3))
    write_status(folder, point.number, status)
    return status


def _run(sweep: Sweep, point: Point, shared: Shared, force: bool) -> Status:
    if point.refused or point.recipe is None:
        raise UserError(point.refused)
    if sweep.pruning is not None and (status := pruned(sweep, sweep.pruning, point.recipe, shared)) is not None:
        return status
    lent = lent_to(sweep, point, shared)
    folder = run_recipe(point.recipe, force, shared, lent=lent).folder
    if lent is not None:
        give_up(sweep, point, lent, shared)
    return Status(DONE, os.path.abspath(folder))
