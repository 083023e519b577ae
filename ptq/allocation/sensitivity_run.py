"""The command ``ptq sensitivity`` behind its command line: from a recipe to a folder with tables and a picture."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from ptq.allocation.candidates import candidates_before, named
from ptq.allocation.one_at_a_time import one_at_a_time
from ptq.allocation.sensitivity import Sensitivity, measured, open_forward, weighing_solver
from ptq.allocation.tables import save_csv, save_picture, tables_of
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.files.atomic import ensure_folder, write_text
from ptq.run.experiment import checked
from ptq.run.preflight import check_before
from ptq.run.record.journal import Journal
from ptq.run.session import open_session

SAMPLES = 16
"""Calibration samples that are used unless more are asked for."""


def with_samples(recipe: Recipe, samples: int | None, by_solver: bool = False) -> tuple[Recipe, int]:
    """Returns `recipe` with as many calibration samples as the sensitivity uses, and how many of these are for Hessians.

    Args:
        recipe: says how many there are.
        samples: that errors are measured on; None for `SAMPLES` at most, and with a solver at most half of the recipe's.
        by_solver: weights are quantized by a solver, on samples of its own: those that the recipe has beyond the first, between as
            many and three times as many.

    Raises:
        UserError: for fewer than one.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--samples: {samples} is too small: use 1 or more")
    given = recipe.calibration.samples
    most = max(1, given // 2) if by_solver else given
    count = min(SAMPLES, most) if samples is None else samples
    solved = max(count, min(3 * count, given - count)) if by_solver else 0
    return dataclasses.replace(
        recipe, calibration=dataclasses.replace(recipe.calibration, samples=count + solved)
    ), solved


def run_sensitivity(
    recipe: Recipe,
    names: Sequence[str],
    given: bool,
    samples: int | None = None,
    check: bool = False,
    output: pathlib.Path | None = None,
    seed: int = 0,
    by_solver: bool = False,
) -> tuple[Sensitivity, pathlib.Path]:
    """Measures what each Linear's rounding costs, shows it, and writes tables and a picture.

    Args:
        recipe: its model, calibration text, scheme (which Linears, and what their integer formats are like) and transforms
            are used.
        names: the candidate formats.
        given: whether somebody has named them: then one that does not fit is refused.
        samples: calibration samples; None for `SAMPLES` at most.
        check: measure the KL of each Linear rounded alone too, which takes a pass through half of the network for each.
        output: the folder; None for ``sensitivity/<hash>`` in the recipe's.
        seed: of the random signs.
        by_solver: of what the recipe's solver makes of weights, where it weighs errors; otherwise of rounding to nearest.

    Returns:
        The sensitivity, and the folder that holds sensitivity.csv, sensitivity.json and sensitivity.png.

    Raises:
        UserError: for anything that the user can mend, before the work where it can be known before.
    """
    recipe, steps = checked(recipe)
    recipe, solved = with_samples(recipe, samples, by_solver)
    named(names, recipe.scheme)
    if by_solver and weighing_solver(steps) is None:
        raise UserError(
            "--rounding: solver, but no step of this recipe weighs errors by what Linears read: use nearest, or steps.gptq"
        )
    check_before(recipe, steps)
    candidates_before(names, recipe, given)
    folder = output or pathlib.Path(recipe.outputs).expanduser() / recipe.name / "sensitivity" / recipe.digest()
    ensure_folder(folder, "--output")
    journal = Journal(folder / "sensitivity.log")
    with open_session(recipe, journal) as session:
        found = measured(session, steps, names, given, seed, solved)
        alone = None
        if check:
            forward = open_forward(session, steps, solved)
            alone = one_at_a_time(session, forward, found.formats)
    for name in found.unreached:
        journal.say(f"no token reaches {name}: nothing is known of what its rounding costs")
    for table in tables_of(found, alone):
        journal.show(table)
    save_csv(found, folder / "sensitivity.csv", alone)
    facts = {"recipe": recipe.as_dict(), "sensitivity": dataclasses.asdict(found), "one_at_a_time": alone}
    write_text(folder / "sensitivity.json", json.dumps(facts, indent=2) + "\n")
    save_picture(found, recipe.name, folder / "sensitivity.png")
    journal.say(f"sensitivity of {len(found.costs)} Linears on {found.tokens} tokens: {folder}")
    return found, folder
