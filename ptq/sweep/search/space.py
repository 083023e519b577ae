"""What a search chooses from: for every option a list of choices, or a range of numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq.config.options import in_yaml
from ptq.errors import UserError, nearest

DIGITS = 6
"""Significant digits of a number that a range gives: 0.3, not 0.30000000000000004."""
_OF_A_RANGE = ("low", "high", "step", "log")


@dataclass(frozen=True)
class Choices:
    """The values of an option, as they are typed."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, both included.

    Attributes:
        low: the least.
        high: the greatest.
        step: the distance of neighbours; None for every number between.
        log: drawn evenly in their logarithm.
        whole: whole numbers only.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False


Axis = Choices | Range
Space = Mapping[str, Axis]
"""Axes by the name of the option."""


def space_from(plain: Any, where: str) -> dict[str, Axis]:
    """Returns the space that plain containers describe: by option a list, or a mapping with low and high.

    Args:
        plain: as read from YAML, such as ``{"scheme.weight.bits": [2, 3, 4], "steps.smooth.alpha": {"low": 0, "high": 1}}``.
        where: of what is read, for messages.

    Raises:
        UserError: for what is neither, or an empty space.
    """
    if not isinstance(plain, dict) or not plain:
        raise UserError(f"{where}: space: expected options with their choices: scheme.weight.bits: [2, 3, 4]")
    return {str(key): axis_from(value, f"{where}: space: {key}") for key, value in plain.items()}


def axis_from(value: Any, where: str) -> Axis:
    """Returns one axis. Raises `UserError` for what is neither choices nor a range of numbers."""
    if isinstance(value, list) and value:
        texts = tuple(dict.fromkeys(map(text_of, value)))
        if len(texts) < 2:
            raise UserError(f"{where}: one choice is nothing to search: give two or more, or make it an override")
        return Choices(texts)
    if isinstance(value, dict) and {"low", "high"} <= set(value):
        return _range(value, where)
    raise UserError(
        f"{where}: {in_yaml(value)!s:.80} is neither a list of choices nor a range: write [a, b, c] or {{low: 0.1, high: 0.9}}"
    )


def as_plain(space: Space) -> dict[str, Any]:
    """Returns a space as `space_from` reads it."""
    done: dict[str, Any] = {}
    for key, axis in space.items():
        if isinstance(axis, Choices):
            done[key] = list(axis.values)
        else:
            ends = {"low": axis.low, "high": axis.high, "step": axis.step, "log": axis.log}
            done[key] = {name: int(v) if axis.whole and name in {"low", "high", "step"} and v is not None else v for name, v in ends.items()}  # fmt: skip
    return done


def text_of(value: Any) -> str:
    """Returns a value as an override has it; numbers without the digits that only rounding brings."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.{DIGITS}g}"
    return in_yaml(value)


def combinations(space: Space) -> int | None:
    """Returns how many points a space has, None where a range has no end of them."""
    counts = [len(axis.values) if isinstance(axis, Choices) else _count(axis) for axis in space.values()]
    return None if None in counts else math.prod(count for count in counts if count is not None)


def _count(axis: Range) -> int | None:
    return None if axis.step is None else math.floor((axis.high - axis.low) / axis.step + 1e-9) + 1


def _range(value: Mapping[str, Any], where: str) -> Range:
    for key in value:
        if key not in _OF_A_RANGE:
            raise UserError(f"{where}: {key}: no such key of a range{nearest(str(key), _OF_A_RANGE)}")
    ends = {name: value[name] for name in ("low", "high", "step") if value.get(name) is not None}
    for name, number in ends.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{where}: {name}: {in_yaml(number)!s:.40} is not a number")
    low, high, step, log = ends["low"], ends["high"], ends.get("step"), value.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log: {in_yaml(log)!s:.40} is not true or false")
    if not low < high:
        raise UserError(f"{where}: low {low} is not below high {high}")
    whole = all(isinstance(number, int) for number in ends.values())
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: step: {step} does not go from {low} to {high}")
    if log and (low <= 0 or (step is not None and (step != 1 or not whole))):
        raise UserError(f"{where}: log: needs low above 0, and no step")
    return Range(low, high, 1 if whole and step is None else step, log, whole)
