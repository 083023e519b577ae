"""Points in processes of this machine, by joblib's loky."""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from joblib.externals.loky import process_executor
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from ptq.sweep.launchers.base import Ended, Feed, Task, refuse_options
from ptq.sweep.work import work_on

TICK_SECONDS = 0.25


class Processes:
    """`jobs` processes that each run one point after another, and keep the model that they have loaded.

    Every process has an executor of its own: one that is killed takes its own point along, and no other.
    """

    def __init__(self, jobs: int, threads: int):
        self.jobs, self.threads = jobs, threads
        self._executors: dict[int, ProcessPoolExecutor] = {}

    def run(self, task: Task, numbers: Iterable[int | None]) -> Iterator[Ended | None]:
        """See `ptq.sweep.launchers.base.Launcher`."""
        feed = Feed(numbers)
        busy: dict[Future[str], tuple[int, int]] = {}
        try:
            while busy or not feed.ended:
                for slot in set(range(self.jobs)) - {slot for slot, _ in busy.values()}:
                    if (number := feed.take()) is not None:
                        future = self._executor(slot).submit(
                            work_on, task.folder, number, task.threads, task.force, task.room
                        )
                        busy[future] = slot, number
                over, _ = wait(busy, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED)
                for future in over:
                    slot, number = busy.pop(future)
                    yield Ended(number, self._problem(future, slot))
                if not over:
                    yield None
        finally:
            for executor in self._executors.values():
                executor.shutdown(wait=True, kill_workers=True)
            self._executors.clear()

    def _executor(self, slot: int) -> ProcessPoolExecutor:
        if slot not in self._executors:
            count = str(self.threads)
            env = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
            self._executors[slot] = ProcessPoolExecutor(1, env=env, initializer=_prepare, initargs=(os.getpid(),))
        return self._executors[slot]

    def _problem(self, future: "Future[str]", slot: int) -> str:
        error = future.exception()
        if error is None:
            return ""
        if isinstance(error, BrokenProcessPool):
            self._executors.pop(slot).shutdown(wait=False, kill_workers=True)
            return "its process was killed, perhaps for want of memory: ptq sweep resume takes it up"
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def build(jobs: int, threads: int, options: Mapping[str, Any], folder: str) -> Processes:
    """Returns the launcher. Raises `UserError` for an option: it has none."""
    refuse_options("processes", options)
    return Processes(jobs, threads)


def _prepare(parent: int) -> None:
    """Lets this process grow, and end when its parent has ended: a killed sweep leaves nobody at work behind."""
    # loky takes 300 MB more than after the first point for a leak and begins another process, which loads the model again.
    process_executor._USE_PSUTIL = False

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
