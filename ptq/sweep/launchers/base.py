"""What a launcher is, and which there are."""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ptq.errors import UserError, nearest


@dataclass(frozen=True)
class Task:
    """What every point is started with.

    Attributes:
        folder: of the sweep.
        threads: of a point's arithmetic.
        force: whether finished ones run again.
        room: bytes that a process may keep of what it computes of a model, for its next points.
    """

    folder: str
    threads: int
    force: bool = False
    room: int = 0


@dataclass(frozen=True)
class Ended:
    """A point that nobody works on any more; `problem` says why where its process ended before the point did."""

    number: int
    problem: str = ""


class Launcher(Protocol):
    """Runs points by `ptq.sweep.work.work_on`."""

    def run(self, task: Task, numbers: Iterable[int | None]) -> Iterator[Ended | None]:
        """Runs the points, in this order as far as one waits for another.

        Yields each that has ended, and None some times a second in between. Closed early, it stops what it has started.

        Args:
            task: what each is started with.
            numbers: of the points, taken when there is room for one; None says that the next is not known yet, and is asked for
                again when another has ended.
        """


class Feed:
    """The numbers of points as a launcher takes them."""

    def __init__(self, numbers: Iterable[int | None]):
        self._numbers = iter(numbers)
        self.ended = False

    def take(self) -> int | None:
        """Returns the next point; None where there is none now, or, as `ended` says, none any more."""
        if self.ended:
            return None
        try:
            return next(self._numbers)
        except StopIteration:
            self.ended = True
            return None


@dataclass(frozen=True)
class _Entry:
    module: str
    extra: str
    meaning: str


LAUNCHERS = {
    "processes": _Entry("ptq.sweep.launchers.processes", "", "processes on this machine, --jobs of them; a killed one ends its point only"),
    "here": _Entry("ptq.sweep.launchers.here", "", "one point after another in this process, for debuggers"),
    "slurm": _Entry("ptq.sweep.launchers.slurm", "slurm", "a Slurm job a point, by submitit; launcher.partition=... and its other parameters"),
    "ray": _Entry("ptq.sweep.launchers.ray", "ray", "a Ray task a point, on launcher.address=... or a cluster started here"),
}  # fmt: skip
"""Launchers by name; each module has ``build(jobs, threads, options)``."""


def build_launcher(name: str, jobs: int, threads: int, options: Mapping[str, Any], folder: str) -> Launcher:
    """Returns a launcher.

    Args:
        name: one of `LAUNCHERS`.
        jobs: how many points at once.
        threads: of each point.
        options: the launcher's own, ``launcher.<name>`` of the command line.
        folder: of the sweep, for what the launcher writes.

    Raises:
        UserError: for an unknown name or option, or where its library is not installed.
    """
    if name not in LAUNCHERS:
        raise UserError(f"--launcher: {name!r} is no launcher{nearest(name, LAUNCHERS)}")
    entry = LAUNCHERS[name]
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        if not entry.extra:
            raise
        raise UserError(
            f"--launcher: {name!r} needs {error.name}, which is not installed: pip install 'ptq-framework[{entry.extra}]'"
        ) from None
    launcher: Launcher = module.build(jobs, threads, dict(options), folder)
    return launcher


def shares_this_machine(name: str, options: Mapping[str, Any]) -> bool:
    """Returns whether points of a launcher with these options run beside one another on this machine, whose memory they share."""
    local = {"slurm": options.get("cluster") == "local", "ray": options.get("address") is None}
    return local.get(name, name == "processes")


def refuse_options(launcher: str, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raises `UserError` for an option that the launcher does not know."""
    for key in options:
        if key not in known:
            hint = nearest(key, known) if known else f": {launcher} has no options, leave it out"
            raise UserError(f"launcher.{key}: no such option of {launcher}{hint}")
