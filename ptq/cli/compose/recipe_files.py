"""Recipe files as Hydra reads them: bounded, without Hydra's own settings; and what of them may run code or read the machine.

A recipe that somebody sent is data. What would run code or tell of the environment is done for what was typed on the command
line, and for the rest with ``--trust`` only.
"""

import functools
import pathlib
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from ptq.cli.catalog import config_folder
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.files.bounded import read_yaml

TARGET = "_target_"
REMOTE = "trust_remote_code"
TASKS = ("evaluation", "tasks")
_TEXTS = tuple(name for name, hint in typing.get_type_hints(Recipe).items() if hint is str)
"""Keys of a recipe that hold a text, and no part of a config."""
_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_]\w*)")


class RecipeFiles(FileConfigSource):
    """The folder of a recipe file: what is in it is checked before Hydra builds it."""

    @staticmethod
    def scheme() -> str:
        """The prefix of such folders in Hydra's search path."""
        return "recipe"

    def is_group(self, config_path: str) -> bool:
        """Whether a folder beside the recipe is one of configs."""
        return super().is_group(config_path) and (not config_path or is_group(pathlib.Path(self.path), config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads one file. Raises `UserError` for one that is too large to be a recipe, or that sets Hydra itself."""
        path = pathlib.Path(self.path) / self._normalize_file_name(config_path)
        if path.exists():
            check_file(path)
        return super().load_config(config_path)


def is_group(folder: pathlib.Path, key: str) -> bool:
    """Returns whether `key` chooses among the configs of a folder beside a recipe: not every folder there holds configs.

    A recipe that is run from its own folder has its results beside it, in ``outputs``.
    """
    own = folder / key
    return key not in _TEXTS and own.is_dir() and any(True for each in ("*.yaml", "*/*.yaml") for _ in own.glob(each))


def check_file(path: pathlib.Path) -> None:
    """Raises `UserError` for a YAML file that is no recipe: too large when its aliases are copied out, or setting Hydra."""
    try:
        text = read_yaml(path)
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return  # Hydra says where
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path}: {error}: name a recipe") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping: a recipe has keys such as model and scheme")
    header = "\n".join(line for line in text.splitlines() if re.match(r"\s*#\s*@", line))
    keys = [str(key) for key in content] if isinstance(content, dict) else []
    entries = (content.get("defaults") if isinstance(content, dict) else None) or []
    for entry in entries if isinstance(entries, list) else []:
        keys += [str(key) for key in entry] if isinstance(entry, dict) else [str(entry)]
    if any(re.match(r"(?:override |optional )*/?hydra(?:[/.@]|$)", key) for key in keys) or "hydra" in header:
        raise UserError(f"{path}: sets Hydra itself, which changes nothing here: take hydra out")


def check_trusted(config: dict[str, Any], overrides: Iterable[Override]) -> None:
    """Raises `UserError` for what would run code and was not typed on the command line.

    Args:
        config: the composed config, as plain containers.
        overrides: what was typed.
    """
    typed = dict(typed_values(overrides))
    for path, value in _leaves(config, ()):
        if path[-1] not in {TARGET, REMOTE} and path[:2] != TASKS:
            continue
        if value in (False, None) or typed.get(path) == value:
            continue
        name = ".".join(path)
        if path[:2] == TASKS:
            raise UserError(
                f"{name}: {value!r:.80} in a recipe file: the templates of a task may run code: read it, then add --trust to the "
                f"command, or type evaluation.tasks=[{value!s:.80}] yourself"
            )
        raise UserError(
            f"{name}: {value!r:.80} in a recipe file would run code: read that code, then add --trust to the command, "
            f"or type {'++' if path[-1] == TARGET else ''}{name}={value!s:.80} yourself"
        )


def environment(trust: bool, overrides: Iterable[str]) -> Any:
    """Returns OmegaConf's resolver ``oc.env`` for recipes: it reads what shipped configs read, and what was typed.

    Args:
        trust: read every variable.
        overrides: what was typed.
    """
    allowed = _shipped_variables() | {name for line in overrides for name in _ENVIRONMENT.findall(line)}

    def read(key: str, *default: Any) -> Any:
        if not trust and key not in allowed:
            raise UserError(
                f"${{oc.env:{key}}}: a recipe file asks for an environment variable: add --trust to the command, "
                "or write its value"
            )
        return oc.env(key, *default)

    return read


@functools.cache
def _shipped_variables() -> frozenset[str]:
    """The environment variables that shipped configs read, so that a recipe may read them through those anyway."""
    texts = (path.read_text(encoding="utf-8") for path in config_folder().rglob("*.yaml"))
    return frozenset(name for text in texts for name in _ENVIRONMENT.findall(text))


def typed_values(overrides: Iterable[Override]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every value that was typed on the command line, with its key."""
    for override in overrides:
        if override.is_delete() or override.is_sweep_override():
            continue
        key = tuple(override.key_or_group.split("."))
        value = override.value()
        plain = OmegaConf.to_container(OmegaConf.create({"value": value})) if isinstance(value, dict | list) else None
        yield from _leaves(plain["value"] if isinstance(plain, dict) else value, key)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, str(i)))
    elif path:
        yield path, value


def is_shipped(config: pathlib.Path) -> bool:
    """Whether a recipe file is one that comes with this package."""
    return config.parent == config_folder().resolve()
