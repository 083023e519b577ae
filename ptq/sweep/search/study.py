"""Optuna's study of a search: what to try next by all that has ended, kept as a file in the sweep's folder."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ptq.errors import UserError
from ptq.files.lease import locked
from ptq.sweep.search.definition import GREATEST, SAMPLERS, Search
from ptq.sweep.search.space import Axis, Choices, text_of

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise UserError(
        f"--search: needs {error.name}, which is not installed: pip install 'ptq-framework[search]'"
    ) from None

FILE = "study.jsonl"
_NAME = "search"
_POINT = "point"


class Study:
    """Asks for points, and is told how they ended. A trial remembers the number of its point.

    What is asked for depends on the seed, on how many trials there are, and on how those ended: a search that was killed goes on
    as one that was not.
    """

    def __init__(self, folder: pathlib.Path, search: Search):
        """Opens the study in `folder`, or makes it. Raises `UserError` for a damaged one."""
        self._options, self._space = search.options, search.space
        self._asked: dict[int, optuna.Trial] = {}
        self._axes = {key: _distribution(axis) for key, axis in search.space.items()}
        kinds = optuna.study.StudyDirection
        directions = [kinds.MAXIMIZE if name in GREATEST else kinds.MINIMIZE for name in search.options.objectives]
        with _quiet():
            try:
                _mend(folder / FILE)
                storage = JournalStorage(JournalFileBackend(str(folder / FILE), lock_obj=_Lock(folder)))  # type: ignore[arg-type]
                self._study = optuna.create_study(storage=storage, study_name=_NAME, directions=directions, load_if_exists=True)  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{folder / FILE}: damaged ({reason}): remove it, and the search begins anew with its finished points"
                ) from None

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, in order."""
        return self._study.get_trials(deepcopy=False)

    def ask(self) -> tuple[int, tuple[str, ...]]:
        """Returns the number of a new trial, and the overrides that make it.

        Raises:
            UserError: where the sampler does not go with the search.
        """
        with _quiet():
            sampler = getattr(optuna.samplers, SAMPLERS[self._options.sampler])
            self._study.sampler = sampler(seed=(self._options.seed + len(self.trials)) % 2**32)
            try:
                trial = self._study.ask(self._axes)
            except (ValueError, ImportError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"search.sampler: {self._options.sampler!r} cannot search this ({reason}): use tpe"
                ) from None
        self._asked[trial.number] = trial
        return trial.number, tuple(f"{key}={text_of(trial.params[key])}" for key in self._space)

    def join(self, trial: int, point: int) -> None:
        """Notes the number of a trial's point: one of its own, or of an earlier trial that has the same."""
        self._asked.pop(trial).set_user_attr(_POINT, point)

    def drop(self, trial: int) -> None:
        """Ends a trial that has got no point."""
        with _quiet():
            self._study.tell(trial, state=TrialState.FAIL)

    def lost(self) -> list[int]:
        """Returns the trials that have neither ended nor got a point: their process ended in between."""
        return [t.number for t in self.trials if not t.state.is_finished() and _POINT not in t.user_attrs]

    def tell(self, point: int, values: Sequence[float] | None, pruned: bool = False) -> None:
        """Tells every trial of a point how it ended.

        Args:
            point: its number.
            values: of the objectives in order; None for one that failed, was refused or pruned.
            pruned: whether it was.
        """
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE if values is not None else TrialState.FAIL
        of_it = [t for t in self.trials if t.user_attrs.get(_POINT) == point]
        with _quiet():
            # Samplers are made anew for every question; this one does nothing when it is told, where some want to end Optuna's own loop.
            self._study.sampler = optuna.samplers.RandomSampler(seed=0)
            for trial in of_it:
                if not trial.state.is_finished():
                    self._study.tell(trial.number, values, state=state)
            # A trial that has failed cannot be told again: what a second attempt gave is a trial of its own.
            if state != TrialState.FAIL and of_it and all(t.state == TrialState.FAIL for t in of_it):
                again = optuna.trial.create_trial(
                    state=state, values=values, params=of_it[0].params, distributions=of_it[0].distributions, user_attrs=of_it[0].user_attrs
                )  # fmt: skip
                self._study.add_trial(again)


class _Lock:
    """The lock of the study's file: one that a killed process lets go of."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(locked(self._folder))
        return True

    def release(self) -> None:
        self._held.close()


def _mend(path: pathlib.Path) -> None:
    """Takes off a line that a killed process has not finished: Optuna would read nothing more."""
    if path.is_file():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))


def _distribution(axis: Axis) -> Any:
    distributions = optuna.distributions
    if isinstance(axis, Choices):
        return distributions.CategoricalDistribution(axis.values)
    if axis.whole:
        step = 1 if axis.log else int(axis.step or 1)
        return distributions.IntDistribution(int(axis.low), int(axis.high), axis.log, step)
    return distributions.FloatDistribution(axis.low, axis.high, axis.log, axis.step)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna's lines about every trial, and about what it calls experimental, from the screen."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
