"""From a config name and Hydra overrides to recipes. Hydra and OmegaConf stop here: what leaves are plain dataclasses.

Hydra composes; the schema in `ptq.config.schema` judges. A value override may therefore name any key of the schema, whether the
YAML mentions it or not, and whatever the schema does not know is refused there, with the nearest key.
"""

import copy
import itertools
import pathlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from ptq.cli.catalog import config_folder, groups
from ptq.cli.compose.interpolations import check_interpolations
from ptq.cli.compose.override_words import MOST_CHARACTERS, quoted
from ptq.cli.compose.recipe_files import RecipeFiles, check_trusted, environment, is_group, is_shipped, typed_values
from ptq.cli.compose.recipe_paths import placed
from ptq.config.building import recipe_from
from ptq.config.checking import named
from ptq.config.schema import Recipe
from ptq.errors import UserError, nearest
from ptq.files.bounded import load_yaml

BEST = "best"
"""The choice of a method that goes by the scheme."""
OPTIONAL_GROUPS = ("export",)
"""Groups that a recipe need not name in its defaults for `group=choice` to add them."""


@dataclass(frozen=True)
class Job:
    """One composed experiment.

    Attributes:
        recipe: what is to be run.
        overrides: what a sweep chose for it.
        config: the composed config, as plain containers.
        missing: one line for each path of the recipe file that is nowhere.
    """

    recipe: Recipe
    overrides: tuple[str, ...]
    config: dict[str, Any]
    missing: tuple[str, ...] = ()

    def check_paths(self) -> None:
        """Raises `UserError` for a path of the recipe file that is neither beside it nor in the working folder."""
        if self.missing:
            raise UserError(self.missing[0])


@dataclass(frozen=True)
class Composed:
    """One point of a sweep: what the sweep chose for it, and its recipe or the line that refused it."""

    overrides: tuple[str, ...]
    recipe: Recipe | None
    refused: str = ""


def compose_jobs(config: pathlib.Path, overrides: list[str], multirun: bool = False, trust: bool = False) -> list[Job]:
    """Composes the recipe file `config` with Hydra overrides into jobs, all checked: one, or with `multirun` one per point.

    The `defaults` of a file outside the shipped configs are looked up beside it first, then in the shipped configs.
    A sweep is the product of its choices in the order of the command line, the last varying fastest, as in Hydra's
    basic sweeper.

    Args:
        config: the recipe file.
        overrides: what was typed.
        multirun: one job for each point of a sweep.
        trust: the files may name code to run and environment variables to read, as what was typed may.

    Raises:
        UserError: one line for the first mistake in the file or in an override.
    """
    lines = [quoted(_bounded(line)) for line in overrides]
    with _hydra(config.parent, environment(trust, lines)) as loader, _one_line(config):
        points, files = list(_points(_parse(lines, loader, config), multirun)), _Files(config)
        return [_job(files, list(point), trust) for point in points]


def compose_points(
    config: pathlib.Path, overrides: list[str], zipped: bool = False, trust: bool = False
) -> list[Composed]:
    """Composes the points of a sweep: the product of its choices, the last varying fastest, or `zipped` side by side.

    A point that cannot be composed has the line that says why in place of a recipe.

    Raises:
        UserError: for a line that is no override, and for choices of unequal number where they are `zipped`.
    """
    composed: list[Composed] = []
    lines = [quoted(_bounded(line)) for line in overrides]
    with _hydra(config.parent, environment(trust, lines)) as loader, _one_line(config):
        parsed, files = _parse(lines, loader, config), _Files(config)
        for point in _zipped(parsed) if zipped else _points(parsed, True):
            chosen = tuple(line.lstrip("+") for line, swept in point if swept)
            try:
                with _one_line(config):
                    job = _job(files, list(point), trust)
                    job.check_paths()
                composed.append(Composed(chosen, job.recipe))
            except UserError as error:
                composed.append(Composed(chosen, None, " ".join(str(error).split())))
    return composed


def split_axes(
    config: pathlib.Path, overrides: list[str], trust: bool = False
) -> tuple[list[str], dict[str, list[str] | tuple[float, float]]]:
    """Splits overrides into those of every point and those that a search chooses from.

    Returns:
        The former as typed; by key of the latter its values as typed, or, for ``interval(low, high)``, its two ends.

    Raises:
        UserError: for a line that is no override.
    """
    lines = [quoted(_bounded(line)) for line in overrides]
    fixed: list[str] = []
    axes: dict[str, list[str] | tuple[float, float]] = {}
    with _hydra(config.parent, environment(trust, lines)) as loader, _one_line(config):
        for line, override in zip(lines, _parse(lines, loader, config), strict=True):
            key = override.get_key_element().lstrip("+")
            if not override.is_sweep_override():
                fixed.append(line)
            elif isinstance(ends := override.value(), IntervalSweep):
                axes[key] = float(ends.start or 0), float(ends.end or 0)
            else:
                axes[key] = list(override.sweep_string_iterator())
    return fixed, axes


class ShippedConfigs(SearchPathPlugin):
    """Appends the shipped configs to Hydra's search path, so that a recipe file anywhere may name their groups.

    The folder of that file is read as `RecipeFiles`.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when it is set up."""
        for place in search_path.get_path():
            if place.provider == "main" and not str(place.path).startswith(f"{RecipeFiles.scheme()}://"):
                place.path = f"{RecipeFiles.scheme()}://{place.path}"
        search_path.append(provider="ptq", path=f"file://{config_folder()}")


@contextmanager
def _hydra(folder: pathlib.Path, variables: Any) -> Iterator[ConfigLoader]:
    """Hydra set up to search `folder` first and then the shipped configs, with `variables` as the resolver ``oc.env``."""
    Plugins.instance().register(ShippedConfigs)
    Plugins.instance().register(RecipeFiles)
    OmegaConf.register_new_resolver("oc.env", variables, replace=True)
    # ${shipped:shapes/x} in a recipe is a path below the shipped configs, wherever those are installed.
    OmegaConf.register_new_resolver("shipped", lambda path: str(config_folder() / path), replace=True)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            yield GlobalHydra.instance().config_loader()
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _bounded(line: str) -> str:
    if len(line) > MOST_CHARACTERS:
        raise UserError(f"{line[:60]}...: an override of {len(line)} characters: write it into a recipe file")
    return line


def _parse(overrides: list[str], loader: ConfigLoader, config: pathlib.Path) -> list[Override]:
    folder = config.parent
    parser = OverridesParser.create(config_loader=loader)
    lines = []
    for override in parser.parse_overrides(overrides):
        line, key = str(override.input_line), override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            raise UserError(f"{line}: Hydra's own settings change nothing here: leave it out")
        if not (override.is_delete() or override.package is not None or _is_group(key, folder)):
            # Forced, a value may be set whether or not the YAML mentions its key: the schema judges, not the file.
            line = f"++{line.lstrip('+')}"
        elif key in OPTIONAL_GROUPS and line.startswith(f"{key}="):
            in_defaults, in_file = _names(config, key)
            if override.value() is None and in_file:
                raise UserError(f"{line}: {config.name} itself sets {key}: take it out there")
            if override.value() is None and not in_defaults:
                continue
            if override.value() is None:
                line = f"~{key}"
            elif not in_defaults:
                line = f"+{line}"
        lines.append(line)
    return parser.parse_overrides(lines)


def _names(config: pathlib.Path, group: str) -> tuple[bool, bool]:
    """Returns whether the file's defaults list has an entry for `group`, and whether the file itself has that key.

    A broken file has neither: it is told of when it is composed.
    """
    try:
        content = load_yaml(config)
    except (yaml.YAMLError, ValueError):
        return False, False
    if not isinstance(content, dict):
        return False, False
    entries = [entry for entry in content.get("defaults") or [] if isinstance(entry, dict)]
    return group in {str(key).split()[-1] for entry in entries for key in entry}, group in content


def _is_group(key: str, folder: pathlib.Path) -> bool:
    return "/" in key or (config_folder() / key).is_dir() or is_group(folder, key)


def _points(overrides: list[Override], multirun: bool) -> Iterator[tuple[tuple[str, bool], ...]]:
    """Yields the overrides of each job, each with whether a sweep chose it."""
    yield from itertools.product(*_axes(overrides, multirun))


def _zipped(overrides: list[Override]) -> Iterator[tuple[tuple[str, bool], ...]]:
    """Yields the overrides of each job where the choices go side by side."""
    axes = _axes(overrides, True)
    swept = {axis[0][0].partition("=")[0].lstrip("+"): len(axis) for axis in axes if axis[0][1]}
    if len(set(swept.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in swept.items())
        raise UserError(
            f"--zip: values of unequal number ({counts}): give as many of each, or leave --zip out for the product"
        )
    count = next(iter(swept.values()), 1)
    # Without an override there is one point still.
    yield from zip(*(axis if axis[0][1] else axis * count for axis in axes), strict=True) if axes else [()]


def _axes(overrides: list[Override], multirun: bool) -> list[list[tuple[str, bool]]]:
    axes: list[list[tuple[str, bool]]] = []
    for override in overrides:
        if not override.is_sweep_override():
            axes.append([(str(override.input_line), False)])
        elif not multirun:
            raise UserError(
                f"{override.input_line}: several values for one run: add -m to run them all, or quote a comma"
            )
        elif not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: an interval has no end of values: list them, or use range()")
        else:
            key = override.get_key_element()
            axes.append([(f"{key}={value}", True) for value in override.sweep_string_iterator()])
    return axes


class _Files:
    """Composes the points of a recipe file: those that choose the same files, and differ in values, share what the files give."""

    def __init__(self, config: pathlib.Path):
        self.config = config
        self._given: dict[tuple[str, ...], DictConfig] = {}

    def composed(self, lines: list[str]) -> DictConfig:
        """Returns what `_composed` does."""
        overrides = OverridesParser.create().parse_overrides(lines)
        # What is deleted may be a value's key, whose place among the values counts: Hydra does all of it then.
        if any(o.is_delete() or o.package is not None for o in overrides):
            return _composed(self.config, lines)
        values = [o.is_force_add() and not _is_group(o.key_or_group, self.config.parent) for o in overrides]
        choices = tuple(line for line, value in zip(lines, values, strict=True) if not value)
        if choices not in self._given:
            self._given[choices] = _composed(self.config, list(choices))
        found = copy.deepcopy(self._given[choices])
        try:
            for override in itertools.compress(overrides, values):
                # As Hydra does after it has put the files together, in the order of the lines.
                OmegaConf.update(found, override.key_or_group, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException:
            return _composed(self.config, lines)  # Hydra says what is wrong.
        return found


def _job(files: _Files, point: list[tuple[str, bool]], trust: bool) -> Job:
    config, lines = files.config, [line for line, _ in point]
    composed = files.composed(lines)
    check_interpolations(_plain(composed, resolve=False), config.name)
    plain = _plain(composed)
    plain.setdefault("name", named(config.stem))
    missing: tuple[str, ...] = ()
    if not is_shipped(config):
        overrides = OverridesParser.create().parse_overrides(lines)
        if not trust:
            check_trusted(plain, overrides)
        missing = placed(plain, config.parent, {key for key, _ in typed_values(overrides)})
    chosen = tuple(line.lstrip("+") for line, swept in point if swept)
    return Job(recipe_from(plain), chosen, plain, missing)


def _composed(config: pathlib.Path, lines: list[str]) -> DictConfig:
    """Composes; ``method=best`` is the file of ``method/best`` that has the name of the scheme.

    Hydra does not know one choice while it looks for another that comes before it: the scheme is asked for first.
    """
    whole = compose(config_name=config.stem, overrides=lines, return_hydra_config=True)
    choices = whole.hydra.runtime.choices
    if choices.get("method") != BEST:
        with open_dict(whole):
            del whole["hydra"]
        return whole
    scheme = str(choices.get("scheme"))
    measured = sorted(path.stem for path in (config_folder() / "method" / BEST).glob("*.yaml"))
    if scheme not in measured:
        raise UserError(
            f"method=best: no recipe was measured for scheme={scheme} (measured are {', '.join(measured)}): name a method, "
            f"such as method=gptq"
        )
    others = [line for line in lines if line.lstrip("+").partition("=")[0] != "method"]
    return compose(config_name=config.stem, overrides=[*others, f"method={BEST}/{scheme}"])


def _plain(composed: DictConfig, resolve: bool = True) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=resolve, throw_on_missing=resolve)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


@contextmanager
def _one_line(config: pathlib.Path) -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML say over many lines into a `UserError` of one."""
    try:
        yield
    except MissingConfigException as error:
        raise UserError(_missing(error)) from None
    except RecursionError:
        raise UserError(f"{config.name}: nested too deep, in the file or in an override: make it flat") from None
    except OverrideParseException as error:
        advice = "expected key=value, +key=value or ~key, with values of special characters in quotes: key='\"a, b\"'"
        raise UserError(f"{error.override!s:.200}: not an override: {advice}") from None
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(_explain(config, error)) from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else str(config)
        raise UserError(f"{place}: not valid YAML: {problem or _flat(error)}: mend the file") from None
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{config}: not a text file in UTF-8: name a recipe in YAML") from None
    except ValueError as error:  # a number of thousands of digits, which Python refuses to read
        raise UserError(f"{config.name}: a value cannot be read ({_flat(error)[:120]}): write another") from None


def _missing(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"defaults: no config {choice!r}: use a group and a choice, such as - model: smollm2-135m"
    return f"{group}: no choice {choice!r}{nearest(choice, error.options or _choices(group))}"


def _choices(group: str) -> list[str]:
    return groups().get(group, [])


def _explain(config: pathlib.Path, error: Exception) -> str:
    text = f"{error} {error.__cause__ or ''}"
    if found := re.search(r"Could not override '([^']+)'.*No match in the defaults list", text, re.DOTALL):
        return f"{found[1]}: {config.name} has no such group in its defaults: write +{found[1]}=... to add it"
    if found := re.search(r"Could not delete(?: from config)?\. ?'?([\w./@-]+)'? does not (?:exist|match)", text):
        return f"~{found[1]}: nothing of that name and value to remove: look at the config with --cfg job"
    told = error if str(error).strip() or error.__cause__ is None else error.__cause__
    return f"{config.name}: {_flat(told)}"


def _flat(error: BaseException) -> str:
    """The error's text on one line, without the search paths and stack frames that follow it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) if lines else type(error).__name__
