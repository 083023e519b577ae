"""Task files in lm-eval's YAML: read as data, checked before the work. What is no file is the name of one of lm-eval's tasks."""

import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ptq.errors import UserError, one_of
from ptq.files.bounded import read_yaml

OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "generate_until")
"""Kinds of tasks whose samples are right or wrong."""
NEEDED = ("task", "dataset_path", "output_type", "doc_to_text", "doc_to_target")
_ENDS = (".yaml", ".yml")
_LOCAL = ("json", "csv", "parquet", "text")


@dataclass(frozen=True)
class TaskSource:
    """One task of a recipe.

    Attributes:
        name: the task's.
        config: what its file holds, paths of data made full; None for one of lm-eval's own.
        digest: over the file and its data, or over lm-eval's version.
    """

    name: str
    config: dict[str, Any] | None
    digest: str


def read_tasks(names: Sequence[str]) -> list[TaskSource]:
    """Returns the tasks of ``evaluation.tasks``, checked.

    Raises:
        UserError: where lm-eval is not installed, for a file that is none, and for a field that it lacks.
    """
    if not names:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation.tasks: needs lm_eval, which is not installed: pip install 'ptq-framework[tasks]'")
    found = [_read(f"evaluation.tasks[{i}]", name) for i, name in enumerate(names)]
    for i, task in enumerate(found):
        if task.name in {other.name for other in found[:i]}:
            raise UserError(f"evaluation.tasks[{i}]: a second task {task.name!r}: rename it, or leave it out")
    return found


def _read(where: str, name: str) -> TaskSource:
    if not name.endswith(_ENDS):
        version = importlib.metadata.version("lm_eval")
        return TaskSource(name, None, hashlib.sha256(f"{name} of lm_eval {version}".encode()).hexdigest())
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{where}: {name} is not there: mend the path")
    try:
        config = yaml.safe_load(read_yaml(path))
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{where}: {name}: {error.problem or 'a tag'}: a task file is data and names no code") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{where}: {name}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: {name}: holds no mapping: a task has fields such as {', '.join(NEEDED)}")
    _check(f"{where}: {name}", config)
    files = _with_data(f"{where}: {name}", config, path.parent)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return TaskSource(str(config["task"]), config, digest.hexdigest())


def _check(where: str, config: dict[str, Any]) -> None:
    """Raises `UserError` for a field that is missing or that no such task has."""
    if "include" in config:
        raise UserError(f"{where}: include: files are read alone: write the fields of the other file into this one")
    for field in NEEDED:
        if config.get(field) in (None, ""):
            raise UserError(f"{where}: {field}: missing: give it a value")
    kind = config["output_type"]
    if kind not in OUTPUT_TYPES:
        raise UserError(
            f"{where}: output_type: {kind!r} is not right or wrong a sample: {one_of(str(kind), OUTPUT_TYPES)}"
        )
    if kind == "multiple_choice" and not config.get("doc_to_choice"):
        raise UserError(f"{where}: doc_to_choice: missing: a multiple_choice task needs its choices")
    if not config.get("test_split") and not config.get("validation_split"):
        raise UserError(f"{where}: test_split: missing, and so is validation_split: say which split is evaluated")


def _with_data(where: str, config: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Makes the relative paths of a task's data full, beside its file first, and returns these files."""
    options = config.get("dataset_kwargs") or {}
    given = options.get("data_files") if isinstance(options, dict) else None
    if config["dataset_path"] in _LOCAL and not given:
        raise UserError(f"{where}: dataset_kwargs.data_files: missing: name the files that {config['dataset_path']} reads")  # fmt: skip
    files: list[pathlib.Path] = []

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: full(item) for key, item in value.items()}
        if isinstance(value, list):
            return [full(item) for item in value]
        path = pathlib.Path(str(value)).expanduser()
        place = folder / path if (folder / path).is_file() else path
        if not place.is_file():
            raise UserError(f"{where}: dataset_kwargs.data_files: {value} is neither beside the task's file nor in {pathlib.Path.cwd()}")  # fmt: skip
        files.append(place.resolve())
        return str(place.resolve())

    if given:
        config["dataset_kwargs"] = {**options, "data_files": full(given)}
    return files
