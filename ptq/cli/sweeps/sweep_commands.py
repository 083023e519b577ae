"""The command lines of sweeps: ``-m`` of ``ptq run`` with its options, and ``ptq sweep``."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ptq.cli.parser import Parser
from ptq.cli.sweeps.ablations import ablation_named, ablations
from ptq.cli.sweeps.prefixed import prefixed_options
from ptq.cli.sweeps.search_commands import TRIALS, searches
from ptq.cli.sweeps.search_commands import run as run_search
from ptq.errors import UserError, nearest

if TYPE_CHECKING:
    from ptq.sweep.points import Sweep

ACTIONS = {
    "resume": "runs what is missing of a sweep: points that wait, failed, or were interrupted",
    "show": "its table as it stands",
}
EXIT_UNFINISHED = 1
"""Exit status of a sweep some of whose points are not done."""
WATCH_SECONDS = 10


def add_options(parser: argparse.ArgumentParser, resume: bool = False) -> None:
    """Adds the options of a sweep to a parser."""
    group = parser.add_argument_group("sweeps" if resume else "sweeps (with -m)")
    if not resume:
        group.add_argument(
            "--ablation", metavar="NAME", help=f"a shipped sweep, with -m implied: {', '.join(ablations())}"
        )
        group.add_argument(
            "--search", metavar="NAME", help=f"a shipped search of its space, with Optuna: {', '.join(searches())}"
        )
        group.add_argument("--zip", action="store_true", help="the values side by side, not their product")
    group.add_argument("--trials", type=int, metavar="N", help=f"points of a search ({TRIALS})")
    group.add_argument("--jobs", type=int, metavar="N", help="points at once, memory and threads divided (1)")
    group.add_argument("--threads", type=int, metavar="N", help="threads of each point (those there are, divided)")
    group.add_argument("--launcher", metavar="NAME", help="processes, here, slurm or ray (processes)")


def with_ablation(options: argparse.Namespace) -> None:
    """Fills the options of ``ptq run`` with what the ablation that they name says; what was typed comes before it."""
    if options.ablation is None:
        return
    found = ablation_named(options.ablation)
    typed = {_key(word) for word in options.overrides}
    options.overrides = [word for word in found.overrides if _key(word) not in typed] + options.overrides
    options.multirun, options.zip = True, options.zip or found.zipped
    if options.config_name is None:
        options.config_name = found.recipe


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def refuse_without_multirun(options: argparse.Namespace) -> None:
    """Raises `UserError` for an option of sweeps that was given without ``-m``."""
    for name in ("zip", "jobs", "threads", "launcher", "trials"):
        if getattr(options, name):
            add = "--search" if name == "trials" else "-m"
            raise UserError(
                f"--{name}: is for {'searches' if name == 'trials' else 'sweeps'}: add {add}, or leave it out"
            )


def sweep(path: pathlib.Path, options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs the sweep that a command line with ``-m`` asks for; with ``--dry-run`` its points are checked only.

    Args:
        path: the recipe's file.
        options: parsed by the parser of ``ptq run``.
        command: the command line, to be kept.
    """
    from ptq.cli.compose.hydra_edge import compose_points
    from ptq.sweep.points import Point, Sweep, folder_for

    if options.trials is not None:
        raise UserError("--trials: is for searches: add --search, or leave it out")
    own, overrides = prefixed_options("launcher", options.overrides)
    composed = compose_points(path, overrides, options.zip, options.trust)
    points = [Point(i, c.overrides, c.recipe, c.refused) for i, c in enumerate(composed, 1)]
    first = next((point.recipe for point in points if point.recipe is not None), None)
    if first is None:
        raise _all_refused(points)
    folder = folder_for(first.outputs, first.name, points).absolute()
    made = Sweep(first.name, folder, tuple(points), tuple(command), os.getcwd())
    return _run(made, options, own)


def sweep_command(arguments: list[str], program: str) -> int:
    """``ptq sweep resume | show SWEEP``."""
    actions = "; ".join(f"{name}: {what}" for name, what in ACTIONS.items())
    parser = Parser(prog=program, allow_abbrev=False, description=f"Looks after a sweep. {actions}.")
    parser.add_argument("action", metavar="resume|show", help="what to do")
    parser.add_argument("sweep", metavar="SWEEP", help="its folder: outputs/sweeps/<recipe>/<hash>")
    parser.add_argument("options", nargs="*", metavar="launcher.key=value", help="options of the launcher")
    parser.add_argument("--force", action="store_true", help="run again what is finished")
    parser.add_argument("--dry-run", action="store_true", help="check the points, run none")
    parser.add_argument("--trust", action="store_true", help="the sweep's recipes may name code to run")
    add_options(parser, resume=True)
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    if given.action not in ACTIONS:
        raise UserError(
            f"{given.action!r} is nothing to do with a sweep: use resume or show{nearest(given.action, ACTIONS)}"
        )
    from ptq.cli.compose.recipe_files import check_trusted
    from ptq.report.plain import plain_console
    from ptq.sweep.display import table_of
    from ptq.sweep.points import read_sweep
    from ptq.sweep.search.definition import read_search
    from ptq.sweep.table import by_result, rows_of

    found = read_sweep(pathlib.Path(given.sweep).expanduser().absolute())
    if given.action == "show":
        plain_console(width=None if plain_console().is_terminal else 160).print(
            table_of(by_result(rows_of(found)), found.name)
        )
        return 0
    own, rest = prefixed_options("launcher", given.options)
    if rest:
        raise UserError(f"{rest[0]}: a sweep that exists keeps its options: start another one with -m")
    for point in found.points:
        if point.recipe is not None and not given.trust:
            check_trusted(point.recipe.as_dict(), ())
    if not os.path.isdir(found.cwd):
        raise UserError(f"{found.folder}: was started in {found.cwd}, which is gone: start it again with -m")
    searched = read_search(found.folder)
    if searched is None and given.trials is not None:
        raise UserError("--trials: is for searches, and this is none: leave it out")
    with contextlib.chdir(found.cwd):
        if searched is not None:
            return run_search(dataclasses.replace(searched, trials=given.trials or searched.trials), found, given, own)
        return _run(found, given, own)


def _run(made: "Sweep", options: argparse.Namespace, own: dict[str, Any]) -> int:
    """Checks the points of a sweep and runs those that are missing."""
    from ptq.models.shared import Shared
    from ptq.report.plain import plain_console
    from ptq.sweep.display import Display
    from ptq.sweep.launchers.base import Task, build_launcher, shares_this_machine
    from ptq.sweep.loop import check_points, conclude, run_sweep
    from ptq.sweep.resources import jobs_that_fit, room_of, threads_for, threads_set

    for name in ("jobs", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}: {value} is too small: use 1 or more")
    console = plain_console()
    display = Display(made.name, console if console.is_terminal else plain_console(width=160))
    name, jobs = options.launcher or "processes", min(options.jobs or 1, len(made.points))
    if shares_this_machine(name, own):
        jobs, line = jobs_that_fit(jobs, [p.recipe for p in made.points if p.recipe is not None])
        if line:
            display.console.print(line)
    threads = options.threads or threads_for(jobs)
    launcher = build_launcher(name, jobs, threads, own, str(made.folder))
    with threads_set(threads):
        checked, finished = check_points(made.points, Shared(), options.force)
    if all(point.refused for point in checked):
        raise _all_refused(checked)
    made = dataclasses.replace(made, points=checked)
    if options.dry_run:
        return _show_checked(made, finished)
    refused = sum(bool(point.refused) for point in checked)
    counts = f"{len(checked)} points, {len(finished)} finished before{f', {refused} refused' if refused else ''}"
    display.console.print(f"sweep {made.name}: {counts}; {made.folder}")
    missing = [p.recipe for p in made.points if p.recipe and not p.refused and p.number not in finished]
    room = room_of(jobs, missing) if name == "here" or shares_this_machine(name, own) else 0
    task = Task(str(made.folder), threads, options.force, room)
    finding = run_sweep(made, launcher, task, finished, display, jobs)
    conclude(finding, display)
    return 0 if finding.whole else EXIT_UNFINISHED


def _show_checked(made: "Sweep", finished: dict[int, pathlib.Path]) -> int:
    for point in made.points:
        words = (
            f"refused: {point.refused}" if point.refused else "finished before" if point.number in finished else "ok"
        )
        print(f"point {point.number} {' '.join(point.overrides)}: {words}")
    refused = sum(bool(point.refused) for point in made.points)
    print(
        f"{len(made.points)} points, {refused} refused, {len(finished)} finished before; would write to {made.folder}"
    )
    return 0


def _all_refused(points: Sequence[Any]) -> UserError:
    lines = list(dict.fromkeys(point.refused for point in points))
    more = f" (and {len(lines) - 1} other reasons among {len(points)} points)" if len(lines) > 1 else ""
    return UserError(f"{lines[0]}{more}")


def report_command(arguments: list[str], program: str) -> int:
    """``ptq report SWEEP [--output FILE] [--watch [SECONDS]]``."""
    parser = Parser(
        prog=program,
        allow_abbrev=False,
        description="Writes the page of a sweep: one HTML file, CSV and Parquet beside it.",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="its folder: outputs/sweeps/<recipe>/<hash>")
    parser.add_argument("--output", metavar="FILE", help="the page's file (default: report.html in the sweep's folder)")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=int,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"again every so often until the sweep has ended ({WATCH_SECONDS})",
    )
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    if given.watch is not None and given.watch < 1:
        raise UserError(f"--watch: {given.watch} is too small: use 1 second or more")
    from ptq.sweep.page import write_page

    folder = pathlib.Path(given.sweep).expanduser()
    output = pathlib.Path(given.output).expanduser() if given.output else None
    path, open_ = write_page(folder, output, given.watch)
    print(f"page: {path}", flush=True)
    while given.watch is not None and open_:
        time.sleep(given.watch)
        _, open_ = write_page(folder, output, given.watch)
    return 0


COMMANDS = {
    "sweep": ("a sweep made by -m: resume what is missing, show its table", sweep_command),
    "report": ("the page of a sweep, one HTML file; --watch while it runs", report_command),
}
