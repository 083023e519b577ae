"""A point that a few windows show to be worse than another, which is no larger, is not evaluated further."""

import dataclasses
import math
import os
import pathlib

from ptq.config.schema import Recipe
from ptq.evaluation.paired import paired
from ptq.models.shared import Shared
from ptq.run.experiment import finished_before, run_recipe
from ptq.sweep.comparing import Run, read_run
from ptq.sweep.points import Pruning, Sweep
from ptq.sweep.status import DONE, PRUNED, Status
from ptq.sweep.table import Row, figures_of, rows_of

SAME = 1e-6
"""Relative difference up to which two baselines have the same loss on a window: the windows are the same then."""


def pruned(sweep: Sweep, pruning: Pruning, recipe: Recipe, shared: Shared) -> Status | None:
    """Runs `recipe` on the first windows and compares it with the best finished point of no more size, paired over these.

    Returns:
        The status of a point that ends there; None for one that is to be run whole: it is not certainly worse, there is nothing
        to compare it with, or it has been run whole before.
    """
    windows = recipe.evaluation.windows
    if windows is not None and windows <= pruning.windows:
        return None
    done = [row for row in rows_of(sweep) if row.status.kind == DONE]
    if not done or finished_before(recipe, shared) is not None:
        return None
    fewer = dataclasses.replace(recipe.evaluation, windows=pruning.windows)
    folder = run_recipe(dataclasses.replace(recipe, evaluation=fewer, export=None), False, shared).folder
    first = read_run(folder)
    rival = _rival(done, pruning, first)
    if rival is None:
        return None
    other = read_run(pathlib.Path(rival.status.folder))
    count = len(first.losses)
    before = other.metrics["window_losses"]["baseline"][:count]
    same = all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(first.metrics["window_losses"]["baseline"], before, strict=True))  # fmt: skip
    if not same:
        print(
            f"not pruned: the first {count} windows are not those of point {rival.number}: their text is drawn otherwise"
        )
        return None
    # The first windows are of few documents, often of one: taken by document they could decide nothing. This decides about work,
    # not about a result, so windows count by themselves.
    found = paired(other.losses[:count], first.losses, None, pruning.confidence)
    if found.low is None or found.high is None or found.low <= 0:
        return None
    less = f", {pruning.size} no greater" if pruning.size else ""
    line = (
        f"after {count} windows log perplexity is {found.difference:.4f} [{found.low:.4f}, {found.high:.4f}] above that of point "
        f"{rival.number}{less}"
    )
    return Status(PRUNED, os.path.abspath(folder), line)


def _rival(done: list[Row], pruning: Pruning, run: Run) -> Row | None:
    """Returns the row of least perplexity among those that are no larger than `run`."""
    size = None if pruning.size is None else figures_of(run.metrics)[pruning.size]
    able = []
    for row in done:
        other = None if pruning.size is None else row.figure(pruning.size)
        if pruning.size is None or (size is not None and other is not None and other <= size):
            able.append(row)
    return min(able, key=lambda row: (row.figures["quantized_perplexity"] or math.inf, row.number), default=None)
