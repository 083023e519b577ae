"""The one exception for what a user can mend: printed as a single line, exit status 2, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what was wrong, what was expected, what to do.

    Attributes:
        said_elsewhere: another process of the same run tells it.
    """

    said_elsewhere = False


def one_of(value: str, choices: Iterable[str]) -> str:
    """Returns ``"expected one of a, b; did you mean 'a'?"``, or without the question where none is close to `value`."""
    choices = list(choices)
    return f"expected one of {', '.join(choices)}{_question(value, choices)}"


def nearest(value: str, choices: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the choice closest to `value`, or the list of choices when none is close."""
    choices = list(choices)
    return _question(value, choices) or (f"; choose one of: {', '.join(choices)}" if choices else "")


def _question(value: str, choices: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the choice closest to `value`, or nothing when none is close."""
    close = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
