"""Writes the tables of docs/results-files.md anew, from the docstrings: `python -m tests.tools.results_files`."""

import dataclasses
import pathlib
import re
import typing
from collections.abc import Iterator

from ptq.config.meanings import meanings
from ptq.evaluation.token_statistics import Distribution, Estimate
from ptq.report.results import FILES

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results-files.md"
SHARED = {Estimate: "an estimate", Distribution: "a distribution"}
"""Kinds of values that many fields have: each has a table of its own."""


def tables() -> dict[str, list[str]]:
    """Returns the rows of every table by its heading."""
    files = {name: [row for kind in kinds for row in rows(kind)] for name, kinds in FILES.items()}
    return files | {words.capitalize(): list(rows(kind)) for kind, words in SHARED.items()}


def rows(kind: type, path: str = "") -> Iterator[str]:
    """Yields a row for every field of a dataclass, and for those of the dataclasses in it."""
    hints, words = typing.get_type_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = [k for k in (hint, *typing.get_args(hint)) if isinstance(k, type) and dataclasses.is_dataclass(k)]
        name, meaning = f"{path}{field.name}", words[field.name].replace("``", "`").replace("|", r"\|")
        shared = [SHARED[k] for k in inner if k in SHARED]
        yield f"| `{name}` | {meaning.rstrip('.')}{f'; {shared[0]}' if shared else ''} |"
        for k in inner if not shared else ():
            yield from rows(k, f"{name}{'[]' if typing.get_origin(hint) is list else ''}.")


def main() -> None:
    """Puts its table under each heading."""
    text = DOCS.read_text(encoding="utf-8")
    for heading, lines in tables().items():
        table = "\n".join(["| field | is |", "|---|---|", *lines])
        text = re.sub(rf"(## {re.escape(heading)}\n\n)(?:\|.*\n)*\n*", lambda m, t=table: f"{m[1]}{t}\n\n", text)
    DOCS.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
