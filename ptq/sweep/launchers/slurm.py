"""Points as Slurm jobs, by submitit: one job a point, requeued jobs go on after their last finished block."""

import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import submitit
import torch
from submitit.helpers import Checkpointable

from ptq.errors import UserError, nearest
from ptq.sweep.launchers.base import Ended, Feed, Task
from ptq.sweep.work import work_on

TICK_SECONDS = 1.0
GENERIC = {"cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "tasks_per_node", "timeout_min", "stderr_to_stdout"}
"""Parameters that submitit knows for every cluster; all others are Slurm's own, such as partition."""


class PointWork(Checkpointable):
    """The work on a point. A job that Slurm preempts is submitted again: the run knows where it was."""

    def __call__(self, folder: str, number: int, threads: int, force: bool) -> str:
        """See `ptq.sweep.work.work_on`."""
        return work_on(folder, number, threads, force)


class Slurm:
    """A job for each point, at most `most` at once where that is given. Closed early, it cancels what it has submitted."""

    def __init__(self, executor: Any, most: int | None):
        self._executor, self._most = executor, most

    def run(self, task: Task, numbers: Iterable[int | None]) -> Iterator[Ended | None]:
        """See `ptq.sweep.launchers.base.Launcher`."""
        feed, busy = Feed(numbers), dict[int, Any]()
        try:
            while busy or not feed.ended:
                while (self._most is None or len(busy) < self._most) and (number := feed.take()) is not None:
                    busy[number] = self._executor.submit(PointWork(), task.folder, number, task.threads, task.force)
                over = [number for number, job in busy.items() if job.done()]
                for number in over:
                    yield Ended(number, _problem(busy.pop(number)))
                if not over:
                    yield None
                    time.sleep(TICK_SECONDS)
        finally:
            for job in busy.values():
                job.cancel(check=False)


def build(jobs: int, threads: int, options: Mapping[str, Any], folder: str) -> Slurm:
    """Returns the launcher. ``launcher.cluster=local`` runs the jobs on this machine, `jobs` at once.

    Raises:
        UserError: where there is no Slurm, or for a parameter that it does not have.
    """
    given = dict(options)
    cluster = given.pop("cluster", "slurm")
    if cluster not in {"slurm", "local"}:
        raise UserError(f"launcher.cluster: {cluster!r} is neither slurm nor local")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise UserError(
            "--launcher: 'slurm', but this machine has no srun: start it where Slurm is, or use launcher.cluster=local"
        )
    executor = submitit.AutoExecutor(folder=str(pathlib.Path(folder) / "slurm"), cluster=cluster)
    parameters = {"name": "ptq", "cpus_per_task": threads, "timeout_min": 24 * 60}
    if cluster == "local":
        # submitit hides the devices that a job does not ask for, and its points would run on the CPU.
        parameters["gpus_per_node"] = torch.cuda.device_count()
    for key, value in given.items():
        parameters[key if key in GENERIC or key.startswith("slurm_") else f"slurm_{key}"] = value
    own = {name.removeprefix("slurm_") for name in submitit.SlurmExecutor._valid_parameters()} | GENERIC
    for key in given:
        if key.removeprefix("slurm_") not in own:
            raise UserError(f"launcher.{key}: no such parameter of Slurm jobs{nearest(key, own)}")
    executor.update_parameters(**parameters)
    return Slurm(executor, jobs if cluster == "local" or jobs > 1 else None)


def _problem(job: Any) -> str:
    error = job.exception()
    if error is None:
        return ""
    return f"its job {job.job_id} failed ({' '.join(str(error).split())[:200]}): see {job.paths.stderr}"
