"""How much a config's interpolations write out, known before any is resolved: OmegaConf would double a text forty times over."""

import re
from collections.abc import Iterator
from typing import Any

from ptq.errors import UserError

MOST = 1_000_000
"""Characters and values that a recipe may be when its interpolations are written out."""
_OPENED = re.compile(r"\$\{\s*([^${}:]*)(:[^${}]*)?(?=(\$\{)?)")
_OUTSIDE = ("oc.env", "shipped")
"""Resolvers that name nothing of the config."""

Path = tuple[str, ...]


def check_interpolations(config: dict[str, Any], name: str, most: int = MOST) -> None:
    """Raises `UserError` for a config, unresolved, whose interpolations write out more than `most`; `name` is its file's."""
    costs: dict[Path, int] = {}
    for key in config:
        if _cost(config, (key,), costs) > most:
            raise UserError(
                f"{name}: {key}: its ${{...}} write out more than {most:,} characters: write the values instead"
            )


def _cost(config: dict[str, Any], path: Path, costs: dict[Path, int]) -> int:
    """Returns how many characters and values are at `path` when everything there is written out; what is beyond `MOST` is alike."""
    if path not in costs:
        costs[path] = 1  # what names itself is OmegaConf's to refuse
        value = _at(config, path)
        if isinstance(value, dict | list):
            keys = value if isinstance(value, dict) else range(len(value))
            found = 1 + sum(_cost(config, (*path, str(key)), costs) for key in keys)
        elif isinstance(value, str):
            found = len(value) + sum(_cost(config, other, costs) for other in _named(value, path, config))
        else:
            found = 1
        costs[path] = min(found, MOST + 1)
    return costs[path]


def _named(text: str, path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yields the places that interpolations in `text`, the value at `path`, name. Raises `UserError` for a name in pieces."""
    for opened in _OPENED.finditer(text):
        if opened[2] is not None and opened[1].strip() in _OUTSIDE:
            continue
        if opened[3] is not None:
            raise UserError(
                f"{'.'.join(path)}: {text!r:.80}: an interpolation whose name holds another cannot be reckoned: "
                "write the name out (only ${oc.env:...} may hold one)"
            )
        # What follows a resolver's colon may be names of nodes too, as oc.select takes them.
        words = [opened[1]] if opened[2] is None else opened[2][1:].split(",")
        for word in words:
            relative = len(word) - len(word.lstrip("."))
            start = path[: len(path) - relative] if relative else ()
            place = (*start, *filter(None, re.split(r"[.\[\]]+", word.strip().lstrip("."))))
            while place and _at(config, place) is None:
                place = place[:-1]
            if place:
                yield place


def _at(config: dict[str, Any], path: Path) -> Any:
    """Returns the value at `path`, None where there is none."""
    value: Any = config
    for key in path:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value
