"""A sweep: its points, each a recipe or the line that refused it, in a folder of its own."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ptq
from ptq.config.building import recipe_from
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json

DEFINITION = "sweep.json"


@dataclass(frozen=True)
class Pruning:
    """When the work on a point ends early.

    Attributes:
        windows: after so many.
        confidence: of the interval by which it has to be worse than another point.
        size: the figure in which that other point may not be greater; None for any point.
    """

    windows: int
    confidence: float
    size: str | None


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    Attributes:
        number: from 1, in the order of the command line.
        overrides: what the sweep chose for it, such as ``scheme.weight.bits=4``.
        recipe: composed; None where it cannot be composed.
        refused: the line that says why it cannot run, or "".
    """

    number: int
    overrides: tuple[str, ...]
    recipe: Recipe | None
    refused: str = ""


@dataclass(frozen=True)
class Sweep:
    """Points with a name and a folder.

    Attributes:
        name: the recipe's.
        folder: ``<outputs>/sweeps/<name>/<hash over the points>``.
        points: in order.
        command: how to start it again, word by word.
        cwd: the folder that it was started in, which relative paths in recipes mean.
        pruning: when the work on a point ends early; None for never.
    """

    name: str
    folder: pathlib.Path
    points: tuple[Point, ...]
    command: tuple[str, ...]
    cwd: str
    pruning: Pruning | None = None

    @property
    def keys(self) -> list[str]:
        """The swept options, in the order of the command line."""
        return list(dict.fromkeys(key for point in self.points for key, _ in map(split, point.overrides)))

    def write(self) -> None:
        """Writes the sweep's definition into its folder."""
        points = [
            {
                "number": point.number,
                "overrides": list(point.overrides),
                "recipe": None if point.recipe is None else point.recipe.as_dict(),
                "refused": point.refused,
            }
            for point in self.points
        ]
        content: dict[str, Any] = {
            "ptq": ptq.__version__,
            "name": self.name,
            "command": list(self.command),
            "cwd": self.cwd,
        }
        if self.pruning is not None:
            content |= {"pruning": asdict(self.pruning)}
        write_text(self.folder / DEFINITION, json.dumps({**content, "points": points}, indent=1) + "\n")


def split(override: str) -> tuple[str, str]:
    """Returns key and value of an override; a deletion has the value ``(none)``."""
    key, equals, value = override.partition("=")
    return key.lstrip("~+"), value if equals and not override.startswith("~") else "(none)"


def folder_for(outputs: str, name: str, points: Sequence[Point]) -> pathlib.Path:
    """Returns where a sweep's files go: two spellings of one sweep have one folder."""
    parts = [point.recipe.digest() if point.recipe else f"refused {' '.join(point.overrides)}" for point in points]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    return pathlib.Path(outputs).expanduser() / "sweeps" / name / digest


def read_sweep(folder: pathlib.Path) -> Sweep:
    """Returns the sweep in `folder`.

    Raises:
        UserError: when it holds none, or a damaged one.
    """
    path = folder / DEFINITION
    if not path.is_file():
        raise UserError(f"{folder}: holds no sweep: give a folder with {DEFINITION}, outputs/sweeps/<recipe>/<hash>")
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        points = tuple(_point(entry) for entry in found["points"])
        pruning = Pruning(**found["pruning"]) if found.get("pruning") else None
        return Sweep(str(found["name"]), folder, points, tuple(found["command"]), str(found["cwd"]), pruning)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged ({reason}): start the sweep again, its finished points are kept") from None


def _point(entry: dict[str, Any]) -> Point:
    recipe = None if entry["recipe"] is None else recipe_from(entry["recipe"])
    return Point(int(entry["number"]), tuple(map(str, entry["overrides"])), recipe, str(entry["refused"]))
