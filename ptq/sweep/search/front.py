"""The points of a search that no other beats: the best by one objective, the Pareto front by two."""

import csv
import io
import pathlib
from collections.abc import Sequence

from ptq.files.atomic import write_text
from ptq.sweep.search.definition import GREATEST
from ptq.sweep.status import DONE
from ptq.sweep.table import Row

FRONT = "front.csv"


def front(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """Returns the finished rows that no other is as good as in every objective and better in one, the best by the first one first.

    Of rows that are equal in all of them the first stands for all.
    """
    placed: list[tuple[tuple[float, ...], Row]] = []
    for row in rows:
        values = [row.figure(name) for name in objectives]
        known = [value for value in values if value is not None and value == value]
        if row.status.kind == DONE and len(known) == len(values):
            signs = [-1.0 if name in GREATEST else 1.0 for name in objectives]
            placed.append((tuple(sign * value for sign, value in zip(signs, known, strict=True)), row))
    done: dict[tuple[float, ...], Row] = {}
    for place, row in sorted(placed, key=lambda each: (each[0], each[1].number)):
        if not any(all(a <= b for a, b in zip(other, place, strict=True)) for other in done):
            done[place] = row
    return list(done.values())


def write_front(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes ``front.csv`` into the sweep's folder: the columns of points.csv, in the order of the front."""
    flat = [row.flat() for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(flat[0]) if flat else ["point"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(folder / FRONT, buffer.getvalue())
