"""What the fields of a dataclass mean, in the words of its docstring: one source for code, docs, schemas and commands."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping

_NAMED = re.compile(r"    (\w+): (.*)")


@functools.cache
def meanings(kind: type) -> Mapping[str, str]:
    """Returns the meaning of each field, by its name, out of the section ``Attributes`` of the docstring.

    Fields that it does not name are left out; those of a base class are in the base's docstring.

    Raises:
        TypeError: when `kind` is no dataclass.
    """
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind!r} is no dataclass")
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _attributes(inspect.cleandoc(base.__doc__ or ""))
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: words for name, words in found.items() if name in names}


def _attributes(text: str) -> dict[str, str]:
    """Returns the entries of the section: a name, a colon and words; lines that are indented further go on with them."""
    found: dict[str, str] = {}
    name = ""
    inside = False
    for line in text.splitlines():
        if not inside:
            inside = line == "Attributes:"
        elif line and not line.startswith(" "):
            break
        elif match := _NAMED.fullmatch(line):
            name, found[match[1]] = match[1], match[2]
        elif name and line.startswith("        "):
            found[name] += f" {line.strip()}"
    return found
