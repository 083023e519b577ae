"""JSON that every reader takes: figures that are no numbers are null, and every file has a schema that describes its fields."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ptq.config.meanings import meanings

_KINDS = {float: "number", int: "integer", str: "string", bool: "boolean", type(None): "null"}


def as_json(value: Any) -> str:
    """Returns `value` as a JSON document: dataclasses as objects, NaN and infinities, which JSON has not, as null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def schema_of(title: str, kinds: list[type]) -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of an object that holds the fields of all of these dataclasses.

    Descriptions are those of the docstrings (`ptq.config.meanings`). Any number may be null, where it is not finite.
    """
    parts = [_object(kind) for kind in kinds]
    merged = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "type": "object",
        "properties": {name: field for part in parts for name, field in part["properties"].items()},
        "required": [name for part in parts for name in part["required"]],
        "additionalProperties": False,
    }
    return merged


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _object(kind: type) -> dict[str, Any]:
    hints, words = typing.get_type_hints(kind), meanings(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    properties = {name: {"description": words.get(name, ""), **_type(hints[name])} for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _type(hint: Any) -> dict[str, Any]:
    """Returns the schema of one type: plain values, unions with null, lists, mappings by text, dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        kinds = [_type(argument) for argument in arguments]
        simple = [kind["type"] for kind in kinds if set(kind) == {"type"}]
        if len(simple) == len(kinds):
            flat = [name for kind in simple for name in (kind if isinstance(kind, list) else [kind])]
            return {"type": list(dict.fromkeys(flat))}
        return {"anyOf": kinds}
    if origin in {list, tuple}:
        return {"type": "array", "items": _type(arguments[0])}
    if origin in {dict, Mapping}:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _object(hint)
    if hint is float:
        return {"type": ["number", "null"]}
    if hint in _KINDS:
        return {"type": _KINDS[hint]}
    raise TypeError(f"{hint!r} has no JSON type here")
