"""Points as Ray tasks, on a cluster that is there or one that is started here."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray

from ptq.errors import UserError
from ptq.sweep.launchers.base import Ended, Feed, Task, refuse_options
from ptq.sweep.work import work_on

TICK_SECONDS = 0.5
OPTIONS = ("address", "num_gpus")


class Ray:
    """A task for each point, `threads` CPUs each; at most `jobs` at once on a cluster that is started here."""

    def __init__(self, jobs: int, threads: int, address: str | None, gpus: float):
        self._jobs, self._threads, self._address, self._gpus = jobs, threads, address, gpus

    def run(self, task: Task, numbers: Iterable[int | None]) -> Iterator[Ended | None]:
        """See `ptq.sweep.launchers.base.Launcher`."""
        here: dict[str, Any] = (
            {"num_cpus": self._jobs * self._threads} if self._address is None else {"address": self._address}
        )
        try:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False, **here)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"launcher.address: {self._address!r} cannot be reached ({' '.join(str(error).split())[:200]})"
            ) from None
        feed, busy = Feed(numbers), dict[Any, int]()
        # A worker that ends with its point would load the model again for the next: it is kept. Nothing is tried twice:
        # what failed is in the table, and resume takes it up.
        remote: Any = ray.remote(num_cpus=self._threads, num_gpus=self._gpus, max_retries=0, max_calls=0)(work_on)
        try:
            while busy or not feed.ended:
                while (number := feed.take()) is not None:
                    busy[remote.remote(task.folder, number, task.threads, task.force, task.room)] = number
                over, _ = ray.wait(list(busy), num_returns=1, timeout=TICK_SECONDS)
                for reference in over:
                    yield Ended(busy.pop(reference), _problem(reference))
                if not over:
                    yield None
        finally:
            for reference in busy:
                ray.cancel(reference, force=True)
            ray.shutdown()


def build(jobs: int, threads: int, options: Mapping[str, Any], folder: str) -> Ray:
    """Returns the launcher. Raises `UserError` for an option that it does not have."""
    refuse_options("ray", options, OPTIONS)
    gpus = options.get("num_gpus", 0)
    if isinstance(gpus, bool) or not isinstance(gpus, int | float) or gpus < 0:
        raise UserError(f"launcher.num_gpus: {gpus!r} is no number of GPUs: use 0, 1 or a share such as 0.5")
    return Ray(jobs, threads, options.get("address"), float(gpus))


def _problem(reference: Any) -> str:
    try:
        ray.get(reference)
    except (ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError, ray.exceptions.RayError) as error:
        words = " ".join(str(error).split())
        return f"its process was killed or failed ({words[:160]}): ptq sweep resume takes it up"
    return ""
