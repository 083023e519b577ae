"""Where a run stands: running, interrupted after a block, finished; and that one process works on it at a time."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

from ptq.errors import UserError
from ptq.files.bounded import parse_json
from ptq.report.tables import summary
from ptq.run.kept.identity import METRICS
from ptq.run.kept.kept_pass import PROGRESS, RESUME

LOCK = ".running"
"""File of a run's folder that the process at work on it holds a lock on; holds its number."""


@dataclass(frozen=True)
class State:
    """Where a run stands: `kind` is running, finished, interrupted or begun; `lines` say it to people."""

    kind: str
    lines: tuple[str, ...]


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from the same run for as long as the context lasts, where the file system has locks.

    Raises:
        UserError: when another process is at work on it.
    """
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:
        if not _locked(file.fileno()):
            file.seek(0)
            raise UserError(
                f"outputs: process {file.read().strip() or '?'} is at work on this very run in {folder}: wait for it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def state_of(folder: pathlib.Path) -> State:
    """Returns where the run in `folder` stands.

    Raises:
        UserError: when the folder holds no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: holds no run: give a folder with recipe.yaml, such as outputs/<recipe>/<hash>")
    passes = tuple(_pass(path) for path in sorted((folder / RESUME).glob(f"*/{PROGRESS}")))
    if (process := _holder(folder)) is not None:
        return State("running", (f"running: process {process}", *passes))
    if (folder / METRICS).is_file() and not passes:
        return State("finished", (_finding(folder),))
    if passes:
        return State("interrupted", (*passes, "the same command takes it up there"))
    return State("begun", ("interrupted before its first block was finished: the same command begins again",))


def _locked(descriptor: int) -> bool:
    """Takes the lock. Returns False where another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(folder: pathlib.Path) -> str | None:
    try:
        with (folder / LOCK).open("r", encoding="utf-8") as file:
            return None if _locked(file.fileno()) else file.read().strip()
    except OSError:
        return None


def _pass(path: pathlib.Path) -> str:
    try:
        entry = parse_json(path.read_text(encoding="utf-8"))["entries"][0]
        return f"{path.parent.name}: {int(entry['blocks'])} of {int(entry['of'])} blocks"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"{path.parent.name}: what it kept is damaged, and will be done again"


def _finding(folder: pathlib.Path) -> str:
    try:
        return f"finished: {summary(parse_json((folder / METRICS).read_text(encoding='utf-8')))}"
    except (OSError, ValueError, KeyError, TypeError):
        return "finished, but its metrics.json is damaged: run it again with --force"
