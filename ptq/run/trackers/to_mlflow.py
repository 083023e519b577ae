"""MLflow: a run in the experiment of the recipe's name. ``MLFLOW_TRACKING_URI`` says where; else a store in ``outputs/mlflow``."""

import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from ptq.run.trackers.base import TrackedRun

MOST_PARAMETERS = 100
"""Parameters that MLflow takes at once."""


class MLflow:
    """One run in MLflow, written by a client of its own: nothing global is set."""

    def __init__(self, run: TrackedRun):
        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        files = None if elsewhere else (run.outputs.absolute() / "mlflow" / run.name).as_uri()
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(elsewhere or local_store(run.outputs))
        experiment = self._client.get_experiment_by_name(run.name)
        number = self._client.create_experiment(run.name, files) if experiment is None else experiment.experiment_id
        self._run = self._client.create_run(number, run_name=run.key).info.run_id
        options = [Param(name, str(value)[:500]) for name, value in run.options.items()]
        for start in range(0, len(options), MOST_PARAMETERS):
            self._client.log_batch(self._run, params=options[start : start + MOST_PARAMETERS])

    def figures(self, values: Mapping[str, float]) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        now = _milliseconds()
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, 0) for name, value in values.items()])

    def end(self, files: Sequence[pathlib.Path], problem: str) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        for path in files:
            self._client.log_artifact(self._run, str(path))
        if problem:
            self._client.set_tag(self._run, "problem", problem)
        self._client.set_terminated(self._run, "FAILED" if problem else "FINISHED")


def build(run: TrackedRun) -> MLflow:
    """Returns the tracker of a run."""
    return MLflow(run)


def local_store(outputs: pathlib.Path) -> str:
    """Returns the address of the store in the folder of all results: one database file."""
    folder = outputs.absolute() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _milliseconds() -> int:
    return int(time.time() * 1000)
