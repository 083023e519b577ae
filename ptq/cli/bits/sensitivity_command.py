"""The command line ``ptq sensitivity``: which Linear hurts."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from ptq.cli import catalog
from ptq.cli.parser import Parser
from ptq.cli.threads import limit_threads
from ptq.errors import UserError

if TYPE_CHECKING:
    from ptq.config.schema import Recipe

CHECK = "one-at-a-time"
NEAREST, SOLVER = "nearest", "solver"


def add_recipe(parser: argparse.ArgumentParser, formats: str, rounding: str) -> None:
    """Adds to a parser what names a recipe, and what both commands of this folder take beside it."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of the recipe")
    parser.add_argument("--config", metavar="RECIPE", required=True, help="a recipe's name, or a path to a .yaml file")
    parser.add_argument(
        "--formats",
        metavar="A,B,...",
        help=f"candidate formats of weights: int4, int4_g64, int4_g64_asym, nf4, fp4, ... ({formats})",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="calibration samples (the recipe's, 16 at most)")
    parser.add_argument(
        "--rounding",
        choices=[NEAREST, SOLVER],
        default=rounding,
        help=f"whose errors are measured: those of rounding to nearest, or of the recipe's solver, such as GPTQ ({rounding})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random signs (0)")
    parser.add_argument(
        "--trust", action="store_true", help="a recipe file may name code to run and environment variables to read"
    )


def recipe_of(options: argparse.Namespace) -> "Recipe":
    """Returns the one recipe that the command line names. Raises `UserError` for a mistake in it."""
    from ptq.cli.compose.hydra_edge import compose_jobs

    job = compose_jobs(catalog.locate(options.config), options.overrides, trust=options.trust)[0]
    job.check_paths()
    return job.recipe


def names_of(given: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the formats that ``--formats`` names, or the usual ones. Raises `UserError` where it names none."""
    if given is None:
        return usual
    names = tuple(name.strip() for name in given.split(",") if name.strip())
    if not names:
        raise UserError(f"--formats: {given!r} names none: use names such as {','.join(usual)}")
    return names


def sensitivity_command(arguments: list[str], program: str) -> int:
    """``ptq sensitivity --config RECIPE [key=value ...] [--formats A,B] [--check one-at-a-time] [--output FOLDER]``."""
    from ptq.allocation.usual_formats import DEFAULTS

    parser = Parser(
        prog=program, allow_abbrev=False,
        description="Predicts what rounding each Linear's weight to each format costs, in nats of KL to the baseline.",
    )  # fmt: skip
    add_recipe(parser, ",".join(DEFAULTS), NEAREST)
    parser.add_argument("--check", choices=[CHECK], help="measure it too: each Linear rounded alone, a pass each")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where to (default: sensitivity/ among the recipe's results)"
    )
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    limit_threads()
    recipe = recipe_of(given)
    from ptq.allocation.sensitivity_run import run_sensitivity

    run_sensitivity(
        recipe,
        names_of(given.formats, DEFAULTS),
        given.formats is not None,
        given.samples,
        given.check == CHECK,
        pathlib.Path(given.output).expanduser() if given.output else None,
        given.seed,
        given.rounding == SOLVER,
    )
    return 0


COMMANDS = {"sensitivity": ("which Linear hurts: what rounding each weight costs, for all formats in one pass", sensitivity_command)}  # fmt: skip
