"""From a config's name and overrides to plain containers. The only place that knows Hydra and OmegaConf."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq.config import Recipe, recipe_from
from ptq.errors import UserError, nearest

GROUPS = ("model", "data", "scheme", "method", "export")


def shipped_configs() -> pathlib.Path:
    """Returns the folder of the shipped recipes: configs/ of a checkout, or its copy inside an installed wheel."""
    package = pathlib.Path(__file__).resolve().parent.parent
    checkout = package.parent / "configs"
    return checkout if checkout.is_dir() else package / "_configs"


def recipes() -> list[str]:
    """Returns the names of the shipped recipes."""
    return sorted(p.stem for p in shipped_configs().glob("*.yaml"))


def locate(config: str) -> pathlib.Path:
    """Returns the file that ``--config`` means: a bare name from configs/, with or without .yaml, or a path anywhere.

    Raises:
        UserError: when there is none; names the nearest.
    """
    path = pathlib.Path(config).expanduser()
    if path.is_file():
        return path.resolve()
    if len(path.parts) == 1:
        shipped = shipped_configs() / f"{config.removesuffix('.yaml')}.yaml"
        if shipped.is_file():
            return shipped
        raise UserError(f"--config: no recipe {config!r}{nearest(config.removesuffix('.yaml'), recipes())}")
    raise UserError(f"--config: {config} is not there: give a path to a file, or one of: {', '.join(recipes())}")


def compose_recipe(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Composes a recipe by Hydra and returns it as plain containers; its ``name`` is the file's stem unless it has one.

    Keys that the composed recipe lacks may be set as well: the schema decides later whether they exist.

    Raises:
        UserError: one line for whatever Hydra refuses.
    """
    path = locate(config)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(path.parent), version_base="1.3"):
            search = [] if path.parent == shipped_configs() else [f"hydra.searchpath=[file://{shipped_configs()}]"]
            composed = compose(path.stem, [*search, *(_forced(o) for o in overrides)])
        plain: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(config, error)) from None
    plain.setdefault("name", path.stem)
    return {str(key): value for key, value in plain.items()}


def recipe(config: str, overrides: Sequence[str]) -> Recipe:
    """Composes and checks a recipe."""
    return recipe_from(compose_recipe(config, overrides))


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expands ``-m`` overrides into one list of overrides a job, by Hydra's own grammar (``a=1,2``, ``range``, ``choice``, ``glob``).

    Raises:
        UserError: for an override that cannot be parsed.
    """
    jobs: list[list[str]] = [[]]
    for override in _parse(overrides):
        if override.is_sweep_override():
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        else:
            values = [str(override.input_line)]
        jobs = [[*job, value] for job in jobs for value in values]
    return jobs


def as_yaml(plain: dict[str, Any]) -> str:
    """Returns composed containers as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"override: {str(error).splitlines()[0]}: write key=value, or ~key to remove") from None


def _forced(override: str) -> str:
    """Lets ``key=value`` also add a key, so that the schema, not the YAML at hand, says which keys there are."""
    parsed = _parse([override])[0]
    plain = not override.startswith(("+", "~")) and parsed.key_or_group not in GROUPS
    return f"++{override}" if plain and not parsed.is_delete() else override


def _one_line(config: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", " ".join(lines))
    if missing:
        group, choice = missing.groups()
        choices = sorted(p.stem for p in (shipped_configs() / group).glob("*.yaml"))
        return f"{group}: no {choice!r} in configs/{group}/{nearest(choice, choices)}"
    deleted = re.search(r"Could not delete from config\. '?([\w.]+)'?", " ".join(lines))
    if deleted:
        return f"~{deleted.group(1)}: the recipe has no such key to remove: see --cfg job for those it has"
    return f"--config {config}: {text}"
