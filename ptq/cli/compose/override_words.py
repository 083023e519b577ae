"""Overrides as people type them: values in any script, with ``~`` and other characters that Hydra's grammar has no word for."""

import re

_FOREIGN = re.compile(r"[^\w\s/\\+.$%*@?|:=,()\[\]{}'\"-]|[^\x00-\x7f]")
"""Characters that Hydra takes inside quotes only."""
MOST_CHARACTERS = 10_000


def quoted(override: str) -> str:
    """Returns `override` with every word of its value in quotes that Hydra reads only so; anything else is left as it is."""
    key, equals, value = override.partition("=")
    if not equals or not _FOREIGN.search(value) or "'" in value or '"' in value:
        return override
    structured = value.lstrip()[:1] in {"[", "{"}
    words = re.split(r"([,:\[\]{}])" if structured else "(,)", value)
    return key + equals + "".join(_quoted(word) if _FOREIGN.search(word) else word for word in words)


def _quoted(word: str) -> str:
    bare = word.strip()
    # In quotes a backslash is one character, but for those right before the closing quote.
    tail = len(bare) - len(bare.rstrip("\\"))
    return f"'{bare}{chr(92) * tail}'"
