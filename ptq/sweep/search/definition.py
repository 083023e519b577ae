"""What a search is: the recipe, the space, how its points are chosen and what is made least; kept in the sweep's folder."""

import hashlib
import json
import pathlib
from dataclasses import asdict, dataclass
from typing import Any

from ptq.config.building import build
from ptq.config.options import option, seed_option
from ptq.config.schema import Recipe
from ptq.errors import UserError, nearest
from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json
from ptq.sweep.points import Pruning
from ptq.sweep.search.space import Axis, as_plain, space_from
from ptq.sweep.table import FIGURES

SEARCH = "search.json"
SAMPLERS = {
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsga2": "NSGAIISampler",
    "nsga3": "NSGAIIISampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
    "grid": "BruteForceSampler",
}
"""Optuna's samplers by the name that they have here."""
LOSSES = ("ratio", "quantized_perplexity", "difference")
"""Objectives that the losses of windows decide, so that a few windows tell of them."""
SIZES = ("model_bits", "bits_per_weight", "bytes")
"""Objectives that are known after a few windows already."""
GREATEST = ("top1_agreement",)
"""Objectives that are the better the greater they are."""
OBJECTIVES = (*FIGURES, "model_bits")


@dataclass(frozen=True)
class SearchOptions:
    """How the points of a search are chosen.

    Attributes:
        sampler: who chooses them: ``tpe`` (tree of Parzen estimators), ``gp`` (Gaussian process), ``nsga2`` and ``nsga3`` (genetic), ``qmc``
            (Sobol), ``random``, ``grid`` (every combination, in random order).
        seed: of the sampler.
        objectives: one or two figures of a row; a Pareto front where there are two.
        prune: after so many windows a point ends that is certainly worse than a finished one of no more size; null for never.
        confidence: of the interval that decides that.
    """

    sampler: str = option("tpe", choices=tuple(SAMPLERS))
    seed: int = seed_option()
    objectives: tuple[str, ...] = ("ratio", "model_bits")
    prune: int | None = option(None, least=2)
    confidence: float = 0.95


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        recipe: the recipe's file.
        overrides: of every point.
        space: the axes by option.
        options: how its points are chosen.
        trials: how many points.
    """

    recipe: str
    overrides: tuple[str, ...]
    space: dict[str, Axis]
    options: SearchOptions
    trials: int

    @property
    def pruning(self) -> Pruning | None:
        """What each point's work has to know of pruning."""
        o = self.options
        size = next((name for name in o.objectives if name in SIZES), None)
        return None if o.prune is None else Pruning(o.prune, o.confidence, size)

    def as_plain(self) -> dict[str, Any]:
        """Returns it as plain containers."""
        options = {**asdict(self.options), "objectives": list(self.options.objectives)}
        return {"recipe": self.recipe, "overrides": list(self.overrides), "space": as_plain(self.space), "options": options, "trials": self.trials}  # fmt: skip

    def write(self, folder: pathlib.Path) -> None:
        """Writes it into the sweep's folder."""
        write_text(folder / SEARCH, json.dumps(self.as_plain(), indent=1) + "\n")

    def digest(self, base: Recipe) -> str:
        """Returns 12 hex digits over everything that decides its points, but their number: a longer search goes on.

        Args:
            base: the recipe without what the space chooses.
        """
        plain = self.as_plain()
        parts = [base.digest(), plain["space"], plain["options"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def search_options(plain: dict[str, Any], where: str = "search") -> SearchOptions:
    """Returns checked options. Raises `UserError` for one that is not known, or does not go with the others."""
    options: SearchOptions = build(SearchOptions, plain, where)
    names = options.objectives
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"{where}.objectives: {name!r} is no figure of a row{nearest(name, OBJECTIVES)}")
    if not 1 <= len(set(names)) == len(names) <= 2:
        raise UserError(f"{where}.objectives: {', '.join(names) or 'none'}: expected one, or two different ones")
    if not 0 < options.confidence < 1:
        raise UserError(f"{where}.confidence: {options.confidence} is not between 0 and 1: use 0.95")
    if options.prune is not None:
        losses = [name for name in names if name in LOSSES]
        if len(losses) != 1 or any(name not in SIZES for name in names if name not in losses):
            raise UserError(
                f"{where}.prune: {options.prune}, but a few windows do not tell of {', '.join(names)}: leave it out, or use one of "
                f"{', '.join(LOSSES)}, alone or with one of {', '.join(SIZES)}"
            )
    return options


def read_search(folder: pathlib.Path) -> Search | None:
    """Returns the search in a sweep's folder, None for a sweep that is none. Raises `UserError` for a damaged one."""
    path = folder / SEARCH
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        space = space_from(found["space"], SEARCH)
        overrides = tuple(map(str, found["overrides"]))
        return Search(
            str(found["recipe"]), overrides, space, search_options(dict(found["options"])), int(found["trials"])
        )
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged ({reason}): start the search again, its finished points are kept") from None
