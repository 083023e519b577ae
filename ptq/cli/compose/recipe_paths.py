"""Relative paths of a recipe file: looked for beside the file, then in the working folder."""

import pathlib
from collections.abc import Collection, Iterator
from typing import Any

from ptq.config.schema import TextConfig


def placed(config: dict[str, Any], folder: pathlib.Path, typed: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Turns the relative paths of `config` that are there beside the recipe file into full ones, in place.

    Args:
        config: the composed config, as plain containers.
        folder: where the recipe file is.
        typed: the keys that were typed on the command line: those mean the working folder, as in any command.

    Returns:
        One line for each path that is in neither place.
    """
    missing = []
    _place_tasks(config, folder, typed)
    for key, owner in _paths(config):
        value = owner.get(key[-1])
        if not isinstance(value, str) or key in typed or not _relative(value):
            continue
        if (folder / value).exists():
            owner[key[-1]] = str((folder / value).resolve())
        elif not pathlib.Path(value).exists() and (key[0] != "model" or _surely_local(value)):
            missing.append(
                f"{'.'.join(key)}: {value} is not there: looked for beside the recipe in {folder}, "
                f"then in {pathlib.Path.cwd()}: mend the path"
            )
    return tuple(missing)


def _place_tasks(config: dict[str, Any], folder: pathlib.Path, typed: Collection[tuple[str, ...]]) -> None:
    """Makes full the task files that are there beside the recipe file; where others are missing, the check of tasks says so."""
    evaluation = config.get("evaluation")
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    if not isinstance(tasks, list):
        return
    for i, value in enumerate(tasks):
        key = ("evaluation", "tasks", str(i))
        if isinstance(value, str) and key not in typed and _relative(value) and (folder / value).is_file():
            tasks[i] = str((folder / value).resolve())


def _paths(config: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields the key of every path, with the mapping that holds it."""
    for part, name in (("model", "path"), ("model", "tokenizer"), ("calibration", "statistics")):
        if isinstance(owner := config.get(part), dict):
            yield (part, name), owner
    if isinstance(data := config.get("data"), dict):
        for part in ("calibration", "evaluation"):
            yield from _of_text(("data", part), data.get(part))


def _of_text(key: tuple[str, ...], text: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if not isinstance(text, dict):
        return
    if text.get("source", TextConfig.source) == "file":
        yield (*key, "path"), text
    mix = text.get("mix")
    for i, item in enumerate(mix if isinstance(mix, list) else ()):
        yield from _of_text((*key, "mix", str(i)), item)


def _relative(value: str) -> bool:
    usable = value.strip() and "\0" not in value and len(value) < 4096
    return bool(usable) and not value.startswith(("/", "~", "package:")) and not pathlib.PurePath(value).is_absolute()


def _surely_local(value: str) -> bool:
    """Whether the path of a model can be no id on the hub, which is owner/name."""
    return value.endswith(".gguf") or value.startswith(("./", "../")) or value.count("/") > 1
