"""The main picture of a sweep as a small PNG: what quantization costs over the swept option, with intervals.

python -m experiments.sweep_picture outputs/sweeps/NAME/HASH docs/picture.png [--option steps.smooth.alpha]
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ptq.errors import UserError
from ptq.files.atomic import write_atomic
from ptq.sweep.points import read_sweep
from ptq.sweep.table import rows_of

MOST_LINES = 6
DECADES = 30.0
"""Quotient of the greatest to the least difference from which on the axis is logarithmic."""


def lines_of(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], option: str) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the finished rows by the setting of the other options, each in the order of `option`; the best lines first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done" and row["difference"] is not None and row[option] != "":
            rest = " ".join(f"{key.rpartition('.')[2]}={row[key]}" for key in keys if key != option and row[key] != "")
            groups.setdefault(rest, []).append(row)
    ordered = {rest: sorted(found, key=lambda row: _place(row[option])) for rest, found in groups.items()}
    best = sorted(ordered, key=lambda rest: min(float(row["difference"]) for row in ordered[rest]))
    return {rest: ordered[rest] for rest in best[:MOST_LINES]}


def draw(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], option: str, path: pathlib.Path) -> None:
    """Writes the picture. Raises `UserError` where no point is done."""
    lines = lines_of(rows, keys, option)
    if not lines:
        raise UserError(f"{option}: no point of this sweep with a value of it is done: run ptq sweep resume first")
    figure = Figure(figsize=(5.2, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    values = list(dict.fromkeys(row[option] for found in lines.values() for row in found))
    numeric = all(isinstance(_place(value)[0], int) and _place(value)[0] == 0 for value in values)
    values.sort(key=_place)
    for rest, found in lines.items():
        at = [_place(row[option])[1] if numeric else values.index(row[option]) for row in found]
        middle = [float(row["difference"]) for row in found]
        low = [m - float(row["difference_low"]) if row["difference_low"] is not None else 0.0 for m, row in zip(middle, found, strict=True)]  # fmt: skip
        high = [float(row["difference_high"]) - m if row["difference_high"] is not None else 0.0 for m, row in zip(middle, found, strict=True)]  # fmt: skip
        axes.errorbar(at, middle, [low, high], marker="o", capsize=3, linewidth=1.4, label=rest or None)
    if not numeric:
        axes.set_xticks(range(len(values)), values, rotation=20, ha="right")
    if any(lines):
        axes.legend(fontsize="x-small")
    axes.set_xlabel(option)
    axes.set_ylabel("difference of perplexity")
    if spans_decades([row for found in lines.values() for row in found]):
        axes.set_yscale("log")
    else:
        axes.axhline(0.0, linewidth=0.8, color="grey", linestyle=":")
    write_atomic(path, lambda place: figure.savefig(place, format="png"))


def spans_decades(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all differences, and the lower ends of their intervals, are above 0, and the greatest one many times the least."""
    ends = [float(row["difference"] if row["difference_low"] is None else row["difference_low"]) for row in rows]
    middle = [float(row["difference"]) for row in rows]
    return min(ends) > 0 and max(middle) > DECADES * min(middle)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the sweep that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("--option", help="what stands below (default: the swept option with the most values)")
    given = parser.parse_args(arguments)
    try:
        sweep = read_sweep(given.sweep)
        rows = [row.flat() for row in rows_of(sweep)]
        keys = sweep.keys
        if given.option is not None and given.option not in keys:
            raise UserError(f"--option: {given.option!r} was not swept: use one of {', '.join(keys)}")
        option = given.option or max(keys, key=lambda key: len({row[key] for row in rows}))
        draw(rows, keys, option, given.picture)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps({"picture": str(given.picture), "option": option, "bytes": given.picture.stat().st_size}))


def _place(value: str) -> tuple[int, float, str]:
    """Returns where a value stands: numbers first, by size, then texts."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


if __name__ == "__main__":
    main()
