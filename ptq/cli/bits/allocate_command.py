"""The command line ``ptq allocate``: which format each Linear should have, verified."""

import pathlib

from ptq.cli.bits.sensitivity_command import SOLVER, add_recipe, names_of, recipe_of
from ptq.cli.parser import Parser
from ptq.cli.threads import limit_threads
from ptq.errors import UserError

EXIT_REFUSED = 1
"""Exit status where the allocation is not better than the best uniform setting."""


def allocate_command(arguments: list[str], program: str) -> int:
    """``ptq allocate --config RECIPE (--bits B | --bytes SIZE | --footprint SIZE) [--no-verify] [key=value ...]``."""
    from ptq.allocation.usual_formats import ALLOCATED

    parser = Parser(
        prog=program, allow_abbrev=False,
        description="Writes a recipe whose overrides spend a budget of bits best, after running it beside the best uniform setting; "
        "exit status 1 where it is not better.",
    )  # fmt: skip
    add_recipe(parser, ",".join(ALLOCATED), SOLVER)
    parser.add_argument(
        "--bits", type=float, metavar="B", help="budget: average bits of a quantized weight, scales included"
    )
    parser.add_argument("--bytes", metavar="SIZE", help="budget: all weights of the model, such as 85MB")
    parser.add_argument("--footprint", metavar="SIZE", help="budget: all weights and a KV cache")
    parser.add_argument("--context", type=int, metavar="N", help="tokens in that cache (2048)")
    parser.add_argument(
        "--against", metavar="FORMAT", help="the uniform setting to verify against (the best that fits)"
    )
    parser.add_argument("--no-verify", action="store_true", help="write the recipe, run nothing")
    parser.add_argument("--output", metavar="FILE", help="the recipe (default: allocated/ among the recipe's results)")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    if given.no_verify and given.against is not None:
        raise UserError(f"--against: {given.against} changes nothing beside --no-verify: leave one of them out")
    limit_threads()
    from ptq.allocation.allocate_run import run_allocate
    from ptq.allocation.budget import budget_from

    budget = budget_from(given.bits, given.bytes, given.footprint, given.context)
    _, verdict = run_allocate(
        recipe_of(given),
        budget,
        names_of(given.formats, ALLOCATED),
        given.formats is not None,
        given.samples,
        not given.no_verify,
        given.against,
        pathlib.Path(given.output).expanduser() if given.output else None,
        given.seed,
        given.rounding == SOLVER,
    )
    return EXIT_REFUSED if verdict is not None and not verdict.better else 0


COMMANDS = {"allocate": ("which format each Linear should have within a budget: a recipe, verified against the best uniform one", allocate_command)}  # fmt: skip
