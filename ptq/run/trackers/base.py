"""What a tracker is, which there are, and the thread that keeps each of them from ever hurting a run."""

import contextlib
import importlib
import importlib.util
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ptq.errors import UserError

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for its trackers, all together."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told first.

    Attributes:
        name: of the recipe.
        key: of the run: the name of its folder.
        folder: of its results.
        outputs: the folder of all results, for trackers that keep files of their own.
        options: every option of the recipe by its dotted name.
    """

    name: str
    key: str
    folder: pathlib.Path
    outputs: pathlib.Path
    options: Mapping[str, Any]


class Tracker(Protocol):
    """Keeps one run. Made by ``build(run)`` of its module when the run begins; may raise or take its time."""

    def figures(self, values: Mapping[str, float]) -> None:
        """Keeps figures by name: seconds of a phase when it has ended, at last the figures of the result."""

    def end(self, files: Sequence[pathlib.Path], problem: str) -> None:
        """Ends the run: with its files, or with the line that says why it failed."""


@dataclass(frozen=True)
class _Entry:
    module: str
    library: str
    extra: str


TRACKERS = {
    "mlflow": _Entry("ptq.run.trackers.to_mlflow", "mlflow", "mlflow"),
    "tensorboard": _Entry("ptq.run.trackers.to_tensorboard", "tensorboard", "tensorboard"),
    "wandb": _Entry("ptq.run.trackers.to_wandb", "wandb", "wandb"),
    "trackio": _Entry("ptq.run.trackers.to_trackio", "trackio", "trackio"),
}
"""Trackers by name."""
Event = Callable[[Tracker], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raises `UserError` for a tracker whose library is not installed."""
    for name in names:
        entry = TRACKERS[name]
        if importlib.util.find_spec(entry.library) is None:
            raise UserError(
                f"trackers: {name!r} needs {entry.library}, which is not installed: pip install 'ptq-framework[{entry.extra}]'"
            )


class Tracked:
    """A run's trackers, each in a thread of its own that is told of events in order.

    One that raises is told nothing more; one that hangs is left behind when the run ends. Both are said in a line, once.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun, say: Callable[[str], None]):
        self._say = say
        self._threads = [_Thread(name, run, say) for name in names]

    def figures(self, values: Mapping[str, float]) -> None:
        """Tells every tracker of figures."""
        if kept := dict(values):
            self._tell(lambda tracker: tracker.figures(kept))

    def end(self, files: Sequence[pathlib.Path] = (), problem: str = "") -> None:
        """Tells every tracker that the run has ended, and waits `CLOSE_SECONDS` for all of them at most."""
        self._tell(lambda tracker: tracker.end(files, problem))
        left = CLOSE_SECONDS
        for thread in self._threads:
            left = thread.close(left)

    def _tell(self, event: Event) -> None:
        for thread in self._threads:
            thread.events.put(event)


class _Thread:
    """One tracker and its thread. The thread is a daemon: a tracker that hangs does not keep the process."""

    def __init__(self, name: str, run: TrackedRun, say: Callable[[str], None]):
        self.name, self.events = name, queue.Queue[Event | None]()
        self._run, self._say = run, say
        self._over = threading.Event()
        threading.Thread(target=self._work, name=f"tracker {name}", daemon=True).start()

    def close(self, seconds: float) -> float:
        """Waits for the thread, `seconds` at most. Returns those that are left."""
        self.events.put(None)
        begun = time.monotonic()
        if not self._over.wait(max(seconds, 0.0)):
            self._say(f"tracker {self.name}: has not ended in {CLOSE_SECONDS:.0f} s and is left behind: what it has kept may lack the end")  # fmt: skip
        return seconds - (time.monotonic() - begun)

    def _work(self) -> None:
        try:
            tracker: Tracker = importlib.import_module(TRACKERS[self.name].module).build(self._run)
            while (event := self.events.get()) is not None:
                event(tracker)
        except BaseException as error:  # whatever a library does, SystemExit too: the run goes on
            reason = " ".join(str(error).split())[:300]
            with contextlib.suppress(Exception):
                self._say(f"tracker {self.name}: {type(error).__name__}{': ' if reason else ''}{reason}: told nothing more of this run")  # fmt: skip
        finally:
            self._over.set()


@contextlib.contextmanager
def tracking(names: Sequence[str], run: TrackedRun, say: Callable[[str], None]) -> Iterator[Tracked]:
    """Tells the trackers `names` of a run while the context lasts; an error in it is what they are told last."""
    tracked = Tracked(names, run, say)
    try:
        yield tracked
    except BaseException as error:
        tracked.end(problem=" ".join(str(error).split()) or type(error).__name__)
        raise
    tracked.end(sorted(path for path in run.folder.iterdir() if path.is_file()))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the plain values in nested mappings and lists by their dotted names."""
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {name: value}
    done: dict[str, Any] = {}
    for key, item in items:
        done |= flat(item, f"{name}.{key}" if name else key)
    return done


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a result that stand by themselves: no lists of windows."""
    kept = {key: value for key, value in metrics.items() if not isinstance(value, list) and key != "window_losses"}
    return {key: float(value) for key, value in flat(kept).items() if isinstance(value, int | float) and not isinstance(value, bool)}  # fmt: skip
