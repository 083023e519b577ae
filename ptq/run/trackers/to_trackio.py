"""trackio: a run in the project of the recipe's name, in trackio's database on this machine; ``trackio show`` opens it."""

import pathlib
from collections.abc import Mapping, Sequence

import trackio

from ptq.run.trackers.base import TrackedRun


class Trackio:
    """One run in trackio."""

    def __init__(self, run: TrackedRun):
        self._run = trackio.init(project=run.name, name=run.key, config=dict(run.options), resume="allow", embed=False)

    def figures(self, values: Mapping[str, float]) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        self._run.log(dict(values))

    def end(self, files: Sequence[pathlib.Path], problem: str) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        if problem:
            self._run.log({"problem": problem})
        self._run.finish()


def build(run: TrackedRun) -> Trackio:
    """Returns the tracker of a run."""
    return Trackio(run)
