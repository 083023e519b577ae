"""Whole runs of small models: the recipe that tests of steps and runs start from, and what a run leaves behind."""

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq.config.building import recipe_from
from ptq.config.schema import Recipe
from ptq.run.experiment import run
from ptq.testing import byte_tokenizer


@dataclass(frozen=True)
class TinyRun:
    """A finished run: its folder, its figures and its log."""

    folder: pathlib.Path
    metrics: dict[str, Any]
    log: str


def tiny_recipe(
    place: pathlib.Path,
    model: pathlib.Path,
    scheme: Mapping[str, Any],
    steps: Mapping[str, Any],
    *,
    samples: int = 4,
    windows: int = 4,
    length: int = 64,
    **changes: Any,
) -> Recipe:
    """Returns a recipe on a model's folder with its outputs and its store under `place`.

    Args:
        place: a folder of the test's own.
        model: the model's folder.
        scheme: as in a recipe.
        steps: as in a recipe.
        samples: of calibration.
        windows: of evaluation.
        length: tokens of both.
        changes: parts of a recipe that take the place of these.
    """
    base = {
        "name": "tiny",
        "model": {"path": str(model)},
        "calibration": {"samples": samples, "length": length},
        "evaluation": {"windows": windows, "length": length},
        "scheme": scheme,
        "steps": steps,
        "outputs": str(place / "outputs"),
        "store": str(place / "store"),
    }
    return recipe_from({**base, **changes})


def tiny_run(place: pathlib.Path, model: pathlib.Path, *args: Any, **changes: Any) -> TinyRun:
    """Runs `tiny_recipe` of these arguments."""
    folder = run(tiny_recipe(place, model, *args, **changes))
    return TinyRun(folder, metrics_of(folder), (folder / "run.log").read_text())


def metrics_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the figures of a finished run."""
    figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return figures


def saved(model: Any, folder: pathlib.Path) -> pathlib.Path:
    """Writes a model with a byte tokenizer; returns the folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
