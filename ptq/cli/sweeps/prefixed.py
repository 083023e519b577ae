"""Options on a command line that are not the recipe's: ``launcher.<name>=<value>``, ``search.<name>=<value>``."""

from collections.abc import Sequence
from typing import Any

import yaml

from ptq.errors import UserError


def prefixed_options(prefix: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the options that begin with `prefix` and a dot, values as YAML reads them, and the other overrides.

    Raises:
        UserError: for one without a value.
    """
    own: dict[str, Any] = {}
    rest: list[str] = []
    for text in overrides:
        if not text.startswith(f"{prefix}."):
            rest.append(text)
            continue
        key, equals, value = text.removeprefix(f"{prefix}.").partition("=")
        if not key or not equals:
            raise UserError(f"{text}: not an option: expected {prefix}.<option>=<value>")
        try:
            own[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{text}: {value!r} is no value: quote it") from None
    return own, rest
