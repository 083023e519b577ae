"""Finished blocks that runs lend each other: of recipes that differ only in what the pass that quantizes them does not see."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

from ptq.config.schema import EvaluationConfig, Recipe
from ptq.errors import UserError
from ptq.files.store import Store
from ptq.run.kept.kept_pass import KeptPass
from ptq.steps._step import TUNER, Step

KIND = "blocks"
UNSEEN = ("tasks", "task_samples", "chunk", "resamples", "confidence")
"""Options of the evaluation that come after the blocks."""


def recipe_of_blocks(recipe: Recipe, steps: Mapping[str, Step]) -> Recipe:
    """Returns the recipe with the defaults of all options that change nothing about how its blocks are quantized and measured.

    These are the export and what is saved for it, the head's format, the tuner's options, and of the evaluation tasks and how figures
    are summed up. The embedding's format, which a tied head has too, is seen: blocks are calibrated on what it gives.

    Args:
        recipe: with its defaults filled in.
        steps: the recipe's.
    """
    default = EvaluationConfig()
    evaluation = dataclasses.replace(recipe.evaluation, **{name: getattr(default, name) for name in UNSEEN})
    return dataclasses.replace(
        recipe,
        evaluation=evaluation,
        scheme=dataclasses.replace(recipe.scheme, head=None),
        steps={name: {} if steps[name].kind == TUNER else options for name, options in recipe.steps.items()},
        execution=dataclasses.replace(recipe.execution, save=False),
        export=None,
    )


@contextlib.contextmanager
def lending(
    lent: Store | None, key_of: Callable[[], str], kept: KeptPass | None, told: Callable[[str], None]
) -> Iterator[None]:
    """Inside the context the pass that `kept` keeps is to run: it goes on after the blocks that another run has lent.

    Where none has, other runs that want them wait meanwhile, and find those of this one afterwards.

    Args:
        lent: what runs have lent each other; None where they do not.
        key_of: gives a digest of all that the finished blocks depend on; asked where runs lend.
        kept: of the pass.
        told: hears in a sentence of waiting, and where there is no room for the blocks.
    """
    if lent is None or kept is None:
        yield
        return
    entry: dict[str, object] = {"blocks": key_of()}
    with contextlib.ExitStack() as stack:
        found, mine = None, False
        try:
            found = stack.enter_context(lent.found_or_mine(KIND, entry, lambda line: told(f"blocks: {line}")))
            mine = found is None
        except UserError as error:
            told(f"blocks: not shared with other runs: {error}")
        if found is not None:
            try:
                kept.borrow(found.parent)
            except OSError as error:
                kept.drop()
                told(f"blocks: those of another run cannot be copied ({error}): quantized again")
        yield
        if mine and kept.begun:
            try:
                lent.add_folder(KIND, entry, kept.lend)
            except UserError as error:
                told(f"blocks: not shared with other runs: {error}")
