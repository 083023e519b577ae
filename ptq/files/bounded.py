"""YAML and JSON of whoever: nested too deep is a ValueError like any other, and what YAML would grow to is known before it is built."""

import json
import pathlib
from typing import Any

import yaml

MOST_BYTES = 1 << 20
MOST_NODES = 20_000
MOST_DEPTH = 50


def parse_json(text: str | bytes) -> Any:
    """Returns what a JSON text holds. Raises ValueError for no JSON, and for what is nested deeper than Python can read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def load_yaml(path: pathlib.Path) -> Any:
    """Returns what a YAML file holds, as plain containers.

    Raises:
        ValueError: for a file that is too large, or what `check_yaml` refuses; `yaml.YAMLError` for no YAML,
            UnicodeDecodeError for no UTF-8.
    """
    return yaml.safe_load(read_yaml(path))


def read_yaml(path: pathlib.Path) -> str:
    """Returns the text of a YAML file that is safe to build. Raises as `load_yaml`."""
    if not path.is_file():
        raise ValueError("it is no file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{size} bytes, and a recipe has {MOST_BYTES} at most")
    text = path.read_text(encoding="utf-8")
    check_yaml(text)
    return text


def check_yaml(text: str) -> None:
    """Checks that `text` builds at most `MOST_NODES` values, its aliases copied out, at most `MOST_DEPTH` deep.

    Raises:
        ValueError: with the reason; `yaml.YAMLError` for no YAML.
    """
    known: dict[str, tuple[int, int]] = {}
    """By anchor: how many values it stands for, and how deep they go."""
    open_: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1, 1))
            if len(open_) > MOST_DEPTH + 1:
                raise ValueError(f"nested more than {MOST_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, nodes, depth = open_.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, nodes, depth = event.anchor, 1, 0
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise ValueError(f"the alias *{event.anchor} stands inside what it names, or before it")
            anchor, (nodes, depth) = None, known[event.anchor]
        else:
            continue
        if anchor is not None:
            known[anchor] = (nodes, depth)
        above, count, deep = open_.pop()
        open_.append((above, count + nodes, max(deep, depth + 1)))
        if open_[-1][1] > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} values, its aliases copied out")
        if len(open_) + open_[-1][2] > MOST_DEPTH + 2:
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
