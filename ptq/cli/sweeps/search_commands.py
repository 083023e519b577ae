"""The command line of searches: ``--search NAME`` of ``ptq run``, and taking one up again."""

import argparse
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ptq.cli import catalog
from ptq.cli.sweeps.prefixed import prefixed_options
from ptq.config.shipped import config_folder
from ptq.errors import UserError, nearest

if TYPE_CHECKING:
    from ptq.sweep.points import Point, Sweep
    from ptq.sweep.search.definition import Search
    from ptq.sweep.search.space import Axis

FOLDER = "search"
"""Folder of the shipped configs that holds search spaces; no config group."""
TRIALS = 30
_KEYS = ("recipe", "overrides", "space", "search")


@dataclass(frozen=True)
class SpaceFile:
    """A search space as its YAML file has it: the recipe it is made for, overrides of every point, axes, options."""

    recipe: str
    overrides: tuple[str, ...]
    space: "dict[str, Axis]"
    options: dict[str, Any]


def searches() -> dict[str, str]:
    """Returns what each shipped search space says of itself, by name."""
    return {path.stem: catalog.describe(path) for path in sorted((config_folder() / FOLDER).glob("*.yaml"))}


def search_named(name: str) -> SpaceFile:
    """Returns a shipped search space, or one from a YAML file. Raises `UserError` where there is none, or it is none."""
    from ptq.sweep.search.space import space_from

    shipped = config_folder() / FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    path = shipped if shipped.is_file() and pathlib.PurePath(name).name == name else pathlib.Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"--search: {name!r} is neither a shipped search nor a file{nearest(name, searches())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--search: {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--search: {path}: expected space, and perhaps recipe, overrides and search")
    for key in content:
        if key not in _KEYS:
            raise UserError(f"--search: {path}: {key}: no such key{nearest(str(key), _KEYS)}")
    overrides, options = content.get("overrides", []), content.get("search", {})
    if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
        raise UserError(f"--search: {path}: overrides: expected a list of overrides such as scheme=w4a16_g64")
    if not isinstance(options, dict):
        raise UserError(f"--search: {path}: search: expected options such as sampler: tpe")
    space = space_from(content.get("space"), f"--search: {path.name}")
    return SpaceFile(str(content.get("recipe", catalog.DEMO)), tuple(overrides), space, options)


def with_search(options: argparse.Namespace) -> None:
    """Fills in the recipe that the search which ``--search`` names is made for, where none was typed."""
    if options.search is not None and options.config_name is None:
        options.config_name = search_named(options.search).recipe


def search(path: pathlib.Path, options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs the search that a command line with ``--search`` asks for; with ``--dry-run`` it is checked only.

    Args:
        path: the recipe's file.
        options: parsed by the parser of ``ptq run``.
        command: the command line, to be kept.
    """
    from ptq.cli.compose.hydra_edge import compose_points, split_axes
    from ptq.sweep.points import Sweep
    from ptq.sweep.search.definition import Search, search_options

    for name in ("ablation", "zip", "multirun"):
        if getattr(options, name):
            raise UserError(f"--{'-m' if name == 'multirun' else name}: is not for a search: leave it out")
    if options.trials is not None and options.trials < 1:
        raise UserError(f"--trials: {options.trials} is too small: use 1 or more")
    found = search_named(options.search)
    own, overrides = prefixed_options("search", options.overrides)
    launcher, overrides = prefixed_options("launcher", overrides)
    typed, axes = split_axes(path, overrides, options.trust)
    taken = {_key(word) for word in typed} | set(axes)
    fixed = (*(word for word in found.overrides if _key(word) not in taken), *typed)
    space = {key: axis for key, axis in found.space.items() if key not in taken} | _axes(axes)
    if not space:
        raise UserError(f"--search: {options.search!r}: every option of its space has one value: leave some free")
    chosen = search_options({**found.options, **own})
    made = Search(str(path), fixed, space, chosen, options.trials or TRIALS)
    base = compose_points(path, list(fixed), trust=options.trust)[0]
    if base.recipe is None:
        raise UserError(base.refused)
    _check_space(made, options.trust)
    windows = base.recipe.evaluation.windows
    if chosen.prune is not None and windows is not None and chosen.prune >= windows:
        raise UserError(
            f"search.prune: after {chosen.prune} windows, but evaluation.windows is {windows}: use fewer, or search.prune=null"
        )
    folder = pathlib.Path(base.recipe.outputs).expanduser() / "sweeps" / base.recipe.name / made.digest(base.recipe)
    sweep = Sweep(base.recipe.name, folder.absolute(), _points_of(folder), tuple(command), os.getcwd(), made.pruning)
    return run(made, sweep, options, launcher)


def run(search: "Search", sweep: "Sweep", options: argparse.Namespace, launcher_options: dict[str, Any]) -> int:
    """Runs a search, or what is missing of it, and shows what it has found. Returns the exit status."""
    from ptq.cli.compose.hydra_edge import compose_points
    from ptq.report.plain import plain_console
    from ptq.sweep.display import Display
    from ptq.sweep.launchers.base import Task, build_launcher, shares_this_machine
    from ptq.sweep.points import Point
    from ptq.sweep.resources import jobs_that_fit, room_of, threads_for, threads_set
    from ptq.sweep.search.loop import conclude, run_search
    from ptq.sweep.search.space import combinations

    for name in ("jobs", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}: {value} is too small: use 1 or more")
    path = pathlib.Path(search.recipe)

    def make(number: int, chosen: Sequence[str]) -> Point:
        composed = compose_points(path, [*search.overrides, *chosen], trust=options.trust)
        if len(composed) != 1:
            return Point(number, tuple(chosen), None, f"{' '.join(chosen)}: several values in one choice: quote commas")
        return Point(number, tuple(chosen), composed[0].recipe, composed[0].refused)

    console = plain_console()
    screen = console if console.is_terminal else plain_console(width=160)
    display = Display(sweep.name, screen, expected=search.trials)
    size = combinations(search.space)
    words = f"{search.trials} trials of {'any number of' if size is None else size} points, {search.options.sampler}, {', '.join(search.options.objectives)}"
    if options.dry_run:
        print(f"search {sweep.name}: {words}; would write to {sweep.folder}")
        return 0
    name, jobs = options.launcher or "processes", min(options.jobs or 1, search.trials)
    room = 0
    if shares_this_machine(name, launcher_options):
        recipe = make(0, ()).recipe
        jobs, line = jobs_that_fit(jobs, [] if recipe is None else [recipe])
        room = room_of(jobs, [] if recipe is None else [recipe])
        if line:
            screen.print(line)
    threads = options.threads or threads_for(jobs)
    launcher = build_launcher(name, jobs, threads, launcher_options, str(sweep.folder))
    known = f"{len(sweep.points)} points so far; " if sweep.points else ""
    screen.print(f"search {sweep.name}: {words}; {known}{sweep.folder}", soft_wrap=True)
    with threads_set(threads):
        task = Task(str(sweep.folder), threads, options.force, room)
        finding = run_search(search, sweep, launcher, task, jobs, make, display)
    conclude(finding, search, display)
    screen.print(f"results: {sweep.folder}", soft_wrap=True)
    return 0 if finding.whole else 1


def _points_of(folder: pathlib.Path) -> "tuple[Point, ...]":
    """Returns the points that a search in `folder` has got already."""
    from ptq.sweep.points import DEFINITION, read_sweep

    return read_sweep(folder).points if (folder / DEFINITION).is_file() else ()


def _check_space(search: "Search", trust: bool) -> None:
    """Raises `UserError` for a range over an option that is no number, or with ends that the option cannot have."""
    from ptq.cli.compose.hydra_edge import compose_points
    from ptq.steps._registry import build_steps
    from ptq.sweep.search.space import Range, text_of

    for key, axis in search.space.items():
        if not isinstance(axis, Range):
            continue
        for end in (axis.low, axis.high):
            word = f"{key}={text_of(end)}"
            [composed] = compose_points(pathlib.Path(search.recipe), [*search.overrides, word], trust=trust)
            line = composed.refused
            if composed.recipe is not None:
                try:
                    build_steps(composed.recipe.steps)
                except UserError as error:
                    line = " ".join(str(error).split())
            if line:
                raise UserError(f"space: {key}: a range of numbers from {text_of(axis.low)} to {text_of(axis.high)}, but {line}")  # fmt: skip


def _axes(typed: "dict[str, list[str] | tuple[float, float]]") -> "dict[str, Axis]":
    from ptq.sweep.search.space import Choices, axis_from

    done: dict[str, Axis] = {}
    for key, axis in typed.items():
        done[key] = axis_from({"low": axis[0], "high": axis[1]}, key) if isinstance(axis, tuple) else Choices(tuple(axis))  # fmt: skip
    return done


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
