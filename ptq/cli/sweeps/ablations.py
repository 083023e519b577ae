"""Shipped ablations: a recipe and the values to sweep over, by a name."""

import pathlib
from dataclasses import dataclass

import yaml

from ptq.cli import catalog
from ptq.config.shipped import config_folder
from ptq.errors import UserError, nearest

FOLDER = "ablation"
"""Folder of the shipped configs that holds them; no config group."""


@dataclass(frozen=True)
class Ablation:
    """A sweep that has a name: the recipe it is made for, its overrides, and whether their values go side by side."""

    recipe: str
    overrides: tuple[str, ...]
    zipped: bool = False


def ablations() -> dict[str, str]:
    """Returns what each shipped ablation says of itself, by name."""
    return {path.stem: catalog.describe(path) for path in sorted((config_folder() / FOLDER).glob("*.yaml"))}


def ablation_named(name: str) -> Ablation:
    """Returns a shipped ablation, or one from a YAML file. Raises `UserError` where there is none, or it is no ablation."""
    shipped = config_folder() / FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    path = shipped if shipped.is_file() and pathlib.PurePath(name).name == name else pathlib.Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"--ablation: {name!r} is neither a shipped ablation nor a file{nearest(name, ablations())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--ablation: {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or set(content) - {"recipe", "overrides", "zip"}:
        raise UserError(f"--ablation: {path}: expected recipe, overrides (a list) and perhaps zip")
    overrides = content.get("overrides")
    if not isinstance(overrides, list) or not overrides or not all(isinstance(word, str) for word in overrides):
        raise UserError(f"--ablation: {path}: overrides: expected a list of overrides such as scheme.weight.bits=3,4")
    return Ablation(str(content.get("recipe", catalog.DEMO)), tuple(overrides), content.get("zip") is True)
