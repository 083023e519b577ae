"""Names as what they are: models, texts and files may be called anything, and neither rich nor matplotlib reads it as markup."""

from typing import IO

from rich.console import Console


def plain_text(text: str) -> str:
    r"""Returns `text` for a title, a label or a legend of matplotlib, drawn as it is: ``m$x_{$`` is no formula.

    Characters that cannot be shown (control characters, undecodable bytes of a path) become their escapes, such as ``\x1b``.
    """
    return printable(text).replace("$", r"\$")


def printable(text: str) -> str:
    r"""Returns `text` with every character that a terminal would obey or refuse as its escape; lines and tabs become blanks."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else ascii(c)[1:-1] for c in text)


def plain_console(file: IO[str] | None = None, width: int | None = None, no_color: bool = False) -> Console:
    """Returns a console that prints texts, and the cells and titles of tables, as they are: no markup, no emoji codes."""
    return Console(
        file=file, width=width, no_color=no_color, soft_wrap=True, highlight=False, markup=False, emoji=False
    )
