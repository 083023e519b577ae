"""What the page shows, gathered from the files of the runs as plain containers. A run that cannot be read leaves gaps."""

import csv
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHANNELS = 30
"""Points whose channel ranges are on the page: the best ones. All of a long sweep would make it too large."""
KL_SHARES = {"median": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}
FINGERPRINTS = ("identity", "weight_fingerprint", "evaluation_fingerprint", "revision")


@dataclass(frozen=True)
class PointOfPage:
    """One row of the page.

    Attributes:
        values: by column, as in points.csv.
        options: the swept options of this point, by name.
        command: the command line that runs this point by itself.
    """

    values: Mapping[str, Any]
    options: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class SearchOfPage:
    """A search, as far as the page of its sweep shows it.

    Attributes:
        about: in a few words: sampler, trials, objectives.
        objectives: the columns of what is made least (or greatest).
        front: the points that no other beats, the best by the first objective first.
    """

    about: str
    objectives: Sequence[str]
    front: Sequence[PointOfPage]


@dataclass(frozen=True)
class PageInput:
    """A sweep, as far as its page shows it: `keys` are the swept options; `refresh` reloads the page after so many seconds."""

    name: str
    folder: str
    command: str
    keys: Sequence[str]
    points: Sequence[PointOfPage]
    refresh: int | None = None
    search: SearchOfPage | None = None


def gather(page: PageInput) -> dict[str, Any]:
    """Returns everything that the page's script reads, JSON-able."""
    best = {id(p) for p in sorted(filter(_done, page.points), key=_perplexity)[:MOST_CHANNELS]}
    points = [_point(point, id(point) in best) for point in page.points]
    return {"keys": list(page.keys), "klShares": KL_SHARES, "points": points}


def facts_of(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what is the same for all points, for the head of the page: model, text, baseline; None where it is not the same."""
    done = [point for point in points if point["metrics"]]
    facts: dict[str, Any] = {}
    for name in ("model", "evaluation_source", "baseline_perplexity", "baseline", "windows", "tokens", "confidence"):
        values = {json.dumps(point["metrics"].get(name)) for point in done}
        facts[name] = json.loads(values.pop()) if len(values) == 1 else None
    return facts


def _point(point: PointOfPage, channels: bool) -> dict[str, Any]:
    folder = pathlib.Path(str(point.values.get("folder") or "."))
    done = _done(point)
    metrics = _json(folder / "metrics.json") if done else {}
    environment = _json(folder / "environment.json") if done else {}
    kept = ("model", "evaluation_source", "baseline_perplexity", "baseline", "windows", "tokens", "confidence")
    kl = (metrics.get("token_statistics") or {}).get("kl") or {}
    return {
        "values": dict(point.values),
        "options": dict(point.options),
        "command": point.command,
        "metrics": {name: metrics.get(name) for name in kept} if metrics else {},
        "kl": [kl.get(name) for name in KL_SHARES] if kl else [],
        "seconds": _mapping(metrics.get("seconds")),
        "size": _mapping(metrics.get("size")),
        "fingerprints": {name: metrics.get(name) for name in FINGERPRINTS if metrics.get(name)},
        "versions": _versions(environment, _mapping(metrics.get("made"))),
        "errors": _errors(folder / "layers.csv") if done else [],
        "channels": _json(folder / "channels.json").get("links", []) if done and channels else [],
    }


def _done(point: PointOfPage) -> bool:
    return point.values.get("status") == "done"


def _perplexity(point: PointOfPage) -> float:
    value = point.values.get("quantized_perplexity")
    return float(value) if isinstance(value, int | float) else float("inf")


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _versions(environment: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    packages = {name: version for name, version in _mapping(environment.get("packages")).items() if version}
    names = ("ptq", "python", "platform", "device", "gpu", "cpu_capability")
    facts = {name: environment[name] for name in names if environment.get(name) is not None}
    facts |= {name: made[name] for name in ("threads", "date") if made.get(name) is not None}
    git = _mapping(environment.get("git"))
    return {**facts, **packages, **({"git": str(git.get("commit", ""))[:12]} if git else {})}


def _errors(path: pathlib.Path) -> list[list[Any]]:
    """Returns (block, Linear within its block, output error) of every quantized Linear; four digits are plenty to look at."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            [*_place(row["name"]), float(f"{float(row['output_error']):.4g}")] for row in rows if row["output_error"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _place(name: str) -> tuple[int, str]:
    """Splits a Linear's full name at its first number, the block's: the others are experts and the like."""
    first = re.search(r"(?:^|\.)(\d+)\.", name)
    return (int(first[1]), name[first.end() :]) if first else (0, name)
