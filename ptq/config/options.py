"""What a field of an options dataclass may hold, said where the field is: choices, bounds, and the options that it is read with.

`option` says it, `check_fields` checks it, `ptq show` prints it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ptq.errors import UserError, one_of

MISSING = dataclasses.MISSING
MOST_SEED = 2**32 - 1
"""The greatest seed that every random generator here takes."""


def option(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    choices: Collection[str] = (),
    least: float | None = None,
    most: float | None = None,
    only_with: Mapping[str, Collection[Any]] | None = None,
) -> Any:
    """Returns a dataclass field that says what it may hold.

    Args:
        default: of the field, as in `dataclasses.field`.
        default_factory: instead of `default`, as there.
        choices: the texts that it may be, or, of a tuple, that its items may be.
        least: the smallest number that it may be.
        most: the greatest.
        only_with: by name of another field of the same dataclass, the values with which this one is read: with others any
            value but the default is refused, because it would change nothing.
    """
    metadata = {
        "choices": tuple(choices),
        "least": least,
        "most": most,
        "only_with": {name: tuple(values) for name, values in (only_with or {}).items()},
    }
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def seed_option() -> Any:
    """Returns the field of a random generator's seed: 0 unless it is given."""
    return option(0, least=0, most=MOST_SEED)


def check_fields(value: Any, path: str) -> None:
    """Checks what `option` says of the fields of a dataclass, and of the dataclasses in it.

    Args:
        value: the dataclass.
        path: its dotted name in the recipe, for messages.

    Raises:
        UserError: for the first field with a value that it cannot have, or that changes nothing with the others.
    """
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            check_fields(item, f"{path}[{i}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            check_fields(item, f"{path}.{key}" if path else str(key))
        return
    if not dataclasses.is_dataclass(value):
        return
    for field in dataclasses.fields(value):
        name = f"{path}.{field.name}" if path else field.name
        given = getattr(value, field.name)
        _check_value(name, given, field.metadata)
        check_fields(given, name)
    for field in dataclasses.fields(value):
        _check_effect(value, field, path)


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """Returns a field's default, or `MISSING` where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def in_yaml(value: Any) -> str:
    """Returns a plain value as YAML spells it: true, null, [a, b]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(in_yaml, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {in_yaml(item)}' for key, item in value.items())}}}"
    return str(value)


def _check_value(path: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata.get("choices", ())
    for item in (value if isinstance(value, tuple) else (value,)) if choices else ():
        if item is not None and item not in choices:
            raise UserError(f"{path}: {item!r} is not valid: {one_of(item, choices)}")
    least, most = metadata.get("least"), metadata.get("most")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if least is not None and number < least:
            raise UserError(f"{path}: {_short(number)} is too small: use {least} or more")
        if most is not None and number > most:
            raise UserError(f"{path}: {_short(number)} is too great: use {most} or less")


def _check_effect(value: Any, field: "dataclasses.Field[Any]", path: str) -> None:
    given = getattr(value, field.name)
    if given == default_of(field):
        return
    for other, read_with in field.metadata.get("only_with", {}).items():
        beside = getattr(value, other)
        if beside not in read_with:
            prefix = f"{path}." if path else ""
            raise UserError(
                f"{prefix}{field.name}: {in_yaml(given)} changes nothing beside {prefix}{other}={in_yaml(beside)}: "
                f"leave it out, or use {prefix}{other}={' or '.join(map(in_yaml, read_with))}"
            )


def _short(number: float) -> str:
    """A number in at most about 30 characters: somebody may give one of a thousand digits."""
    text = (
        str(number)
        if isinstance(number, float) or abs(number) < 10**30
        else f"about 10^{int(number).bit_length() * 3 // 10}"
    )
    return text
