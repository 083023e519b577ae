"""From plain containers, as read from YAML, to the dataclasses of the schema: unknown keys and wrong types are refused."""

import dataclasses
import math
import types
import typing
from typing import Any

from ptq.config.checking import check, refused
from ptq.config.options import check_fields, default_of
from ptq.config.schema import Recipe
from ptq.errors import UserError, nearest
from quantize.spec.quant_spec import SpecError

MOST_SHOWN = 120
"""Characters of a value that a message shows."""


def recipe_from(value: dict[str, Any]) -> Recipe:
    """Builds and checks a `Recipe` out of plain containers. Raises `UserError` with one line for the first mistake."""
    recipe: Recipe = _build(Recipe, value, "", None)
    check(recipe)
    return recipe


def build(cls: type, value: Any, path: str = "") -> Any:
    """Builds dataclass `cls` out of the mapping `value`; unknown keys, wrong types and missing keys raise `UserError`.

    Args:
        cls: a dataclass; what `ptq.config.options.option` says of its fields is checked too.
        value: plain containers, as read from YAML.
        path: the dotted name of `value` in the recipe, for messages.
    """
    built = _build(cls, value, path, None)
    check_fields(built, path)
    return built


def shown(value: Any) -> str:
    """Returns a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _build(cls: type, value: Any, path: str, base: Any) -> Any:
    """Builds `cls` out of `value`; what that leaves out is as in `base`, a field's default, or, where that is None, as `cls` has it."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path or 'recipe'}: {shown(value)} is not a mapping: expected the keys {', '.join(_names(cls))}"
        )
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints:
            raise UserError(
                f"{_join(path, str(key))}: no such key (value {shown(value[key])}){nearest(str(key), hints)}"
            )
    known = {} if base is None else {f.name: getattr(base, f.name) for f in dataclasses.fields(cls)}
    defaults = {f.name: default_of(f) for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        if (
            f.name not in value
            and f.name not in known
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"{_join(path, f.name)}: missing: give it a value")
    arguments = {key: _convert(hints[key], item, _join(path, key), defaults[key]) for key, item in value.items()}
    try:
        return cls(**{**known, **arguments})
    except SpecError as error:
        raise refused(path, error) from None


def _convert(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        return _convert(next((a for a in kinds if a is type(value)), kinds[0]), value, path, default)
    if dataclasses.is_dataclass(hint):
        return _build(
            typing.cast(type, hint), value, path, default if isinstance(default, typing.cast(type, hint)) else None
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: {shown(value)} is not a list")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            without = f", or ~{path} to leave it out" if value is None and path.startswith("steps.") else ""
            raise UserError(f"{path}: {shown(value)} is not a mapping: use {{}} for what it is by default{without}")
        return {str(key): _convert(arguments[1], item, _join(path, str(key))) for key, item in value.items()}
    if hint is Any:
        return value
    return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}: {shown(value)} is beyond every number in floating point") from None
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{path}: {shown(value)} is not {words[hint]}")
    return value


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
