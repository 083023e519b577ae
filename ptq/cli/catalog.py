"""The shipped configs as files: where they are, what they are called, what they say of themselves. Knows no Hydra."""

import pathlib

from ptq.config.shipped import DEMO, config_folder
from ptq.errors import UserError, nearest

__all__ = ["DEMO", "config_folder", "describe", "groups", "locate", "recipes"]


SWEEPS = ("ablation", "search")
"""Folders of the shipped configs that hold sweeps with a name; no config groups."""


def recipes() -> dict[str, str]:
    """Returns what each shipped recipe says of itself, by name."""
    return {path.stem: describe(path) for path in sorted(config_folder().glob("*.yaml"))}


def groups() -> dict[str, list[str]]:
    """Returns the choices of each config group (model, data, scheme, method)."""
    folders = sorted(folder for folder in config_folder().iterdir() if folder.is_dir() and folder.name not in SWEEPS)
    choices = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    return {name: found for name, found in choices.items() if found}  # shapes/ holds models' configs, not choices


def describe(path: pathlib.Path) -> str:
    """Returns the first comment of a YAML file that is not a directive to Hydra."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def locate(name: str) -> pathlib.Path:
    """Returns the YAML file that ``--config`` names: a shipped recipe (``.yaml`` may be left out) or a file anywhere.

    Raises:
        UserError: when there is no such recipe or file; names the nearest recipe.
    """
    if not name:
        raise UserError(f"--config: no name given: use a recipe ({', '.join(recipes())}) or a path to a .yaml file")
    if pathlib.PurePath(name).name == name:
        shipped = config_folder() / (name if name.endswith(".yaml") else f"{name}.yaml")
        if shipped.is_file():
            return shipped
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"--config: {name!r} is a folder: name a .yaml file in it")
    if not path.is_file() and path.with_name(f"{path.name}.yaml").is_file():
        path = path.with_name(f"{path.name}.yaml")
    if not path.is_file():
        stem = pathlib.PurePath(name).name.removesuffix(".yaml")
        raise UserError(f"--config: {name!r} is neither a shipped recipe nor a file{nearest(stem, recipes())}")
    if path.suffix != ".yaml":
        raise UserError(f"--config: {name!r} does not end in .yaml: rename it")
    return path.resolve()
