"""Where a run's files go: the folder of its results, which one process fills, and where the other ranks of a run write to."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.files.atomic import ensure_folder
from ptq.files.scratch import ScratchFolder
from ptq.files.source_digest import PACKAGES, module_digest
from ptq.ranks.world import World
from ptq.report.plain import plain_console
from ptq.run.kept.state import LOCK, alone
from ptq.run.record.journal import Journal
from ptq.steps._step import Step

_BEGINNINGS = {"recipe.yaml", "run.log", "statistics.log", LOCK}
"""What a run writes before its first result."""


@dataclass(frozen=True)
class Places:
    """Where one rank writes to, and where all of them find what an interrupted run has kept.

    Attributes:
        folder: of this rank's files: the run's for rank 0, one that goes afterwards for the others.
        kept: the run's folder.
        quiet: whether nothing is printed.
    """

    folder: pathlib.Path
    kept: pathlib.Path
    quiet: bool

    def journal(self, name: str) -> Journal:
        """Opens the log of that name."""
        return Journal(self.folder / name, plain_console(open(os.devnull, "w")) if self.quiet else None)


@contextmanager
def places_of(recipe: Recipe, steps: Mapping[str, Step], world: World) -> Iterator[Places]:
    """Gives the places of a run, which no other process works on for as long as the context lasts.

    A refusal before there is any result leaves no trace of a folder that was not there before.

    Raises:
        UserError: when another process works on it, or it cannot be written.
    """
    folder = folder_of(recipe, sources_of(steps))
    if not world.leads:
        scratch = ScratchFolder("ptq-rank")
        try:
            yield Places(scratch.path, folder, True)
        finally:
            scratch.cleanup()
        return
    with _folder_of_a_run(folder), alone(folder):
        yield Places(folder, folder, False)


def folder_of(recipe: Recipe, sources: Mapping[str, str]) -> pathlib.Path:
    """Returns ``<outputs>/<recipe>/<hash of the recipe and of methods from outside>``."""
    return pathlib.Path(recipe.outputs).expanduser() / recipe.name / recipe.digest(sources)


def sources_of(steps: Mapping[str, Step]) -> dict[str, str]:
    """Returns a digest of the source of every step that does not come with this package, by the step's name."""
    modules = {name: sys.modules[type(step).__module__] for name, step in steps.items()}
    return {name: module_digest(m) for name, m in modules.items() if m.__name__.partition(".")[0] not in PACKAGES}


@contextmanager
def _folder_of_a_run(folder: pathlib.Path) -> Iterator[None]:
    above = [path for path in (folder, *folder.parents) if not path.exists()]
    ensure_folder(folder, "outputs")
    try:
        yield
    except UserError:
        if above and {path.name for path in folder.iterdir()} <= _BEGINNINGS:
            for path in folder.iterdir():
                path.unlink()
            with contextlib.suppress(OSError):  # another run may have put its own folder beside this one
                for path in above:
                    path.rmdir()
        raise
