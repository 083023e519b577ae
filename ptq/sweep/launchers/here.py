"""Points one after another in this process."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ptq.errors import UserError
from ptq.sweep.launchers.base import Ended, Task, refuse_options
from ptq.sweep.work import work_on


class Here:
    """Runs points in this process: whatever ends it ends the sweep, which can be resumed."""

    def run(self, task: Task, numbers: Iterable[int | None]) -> Iterator[Ended | None]:
        """See `ptq.sweep.launchers.base.Launcher`."""
        for number in numbers:
            yield None
            if number is None:
                continue
            work_on(task.folder, number, task.threads, task.force, task.room)
            yield Ended(number)


def build(jobs: int, threads: int, options: Mapping[str, Any], folder: str) -> Here:
    """Returns the launcher. Raises `UserError` for several jobs at once, or an option."""
    if jobs > 1:
        raise UserError(f"--jobs: {jobs} with --launcher here, which runs one at a time: use --launcher processes")
    refuse_options("here", options)
    return Here()
