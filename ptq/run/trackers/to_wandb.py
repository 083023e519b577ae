"""Weights & Biases: a run in the project of the recipe's name; ``WANDB_MODE=offline`` keeps it on this machine."""

import pathlib
from collections.abc import Mapping, Sequence

import wandb

from ptq.run.trackers.base import TrackedRun


class WeightsAndBiases:
    """One run in Weights & Biases."""

    def __init__(self, run: TrackedRun):
        self._run = wandb.init(
            project=run.name, name=run.key, config=dict(run.options), dir=str(run.folder), reinit="create_new"
        )

    def figures(self, values: Mapping[str, float]) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        self._run.log(dict(values))

    def end(self, files: Sequence[pathlib.Path], problem: str) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        for path in files:
            self._run.save(str(path), base_path=str(path.parent), policy="now")
        if problem:
            self._run.summary["problem"] = problem
        self._run.finish(exit_code=1 if problem else 0)


def build(run: TrackedRun) -> WeightsAndBiases:
    """Returns the tracker of a run."""
    return WeightsAndBiases(run)
