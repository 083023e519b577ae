"""TensorBoard: events in the run's folder; ``tensorboard --logdir outputs`` shows all runs."""

import pathlib
from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from ptq.run.trackers.base import TrackedRun


class TensorBoard:
    """One run as TensorBoard's events."""

    def __init__(self, run: TrackedRun):
        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        lines = "\n".join(f"    {name}: {value}" for name, value in run.options.items())
        self._writer.add_text("recipe", lines)

    def figures(self, values: Mapping[str, float]) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace(".", "/"), value, 0)

    def end(self, files: Sequence[pathlib.Path], problem: str) -> None:
        """See `ptq.run.trackers.base.Tracker`."""
        if problem:
            self._writer.add_text("problem", problem)
        self._writer.close()


def build(run: TrackedRun) -> TensorBoard:
    """Returns the tracker of a run."""
    return TensorBoard(run)
