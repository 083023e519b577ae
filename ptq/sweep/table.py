"""The table of a sweep: one row a point, as CSV, Parquet and JSON that are replaced whole while it grows."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.files.atomic import write_atomic, write_text
from ptq.sweep.points import Sweep, split
from ptq.sweep.status import DONE, Status, metrics_of, status_of

FIGURES = {
    "quantized_perplexity": ("quantized_perplexity",),
    "baseline_perplexity": ("baseline_perplexity",),
    "ratio": ("ratio",),
    "difference": ("difference",),
    "difference_low": ("difference_low",),
    "difference_high": ("difference_high",),
    "kl_mean": ("kl_mean",),
    "kl_p99": ("kl_p99",),
    "top1_agreement": ("top1_agreement",),
    "bits_per_weight": ("size", "bits_per_weight"),
    "bytes": ("size", "after_bytes"),
}
"""Figures of a row by their place in metrics.json."""
COLUMNS = ("point", "status", *FIGURES, "model_bits", "seconds", "identity", "folder", "line")


@dataclass(frozen=True)
class Row:
    """One point: its number, where it stands, the value of every swept option, and its figures where it is done.

    `model_bits` are all of the model's bits for each of its parameters, embedding and head too; None where not known.
    """

    number: int
    status: Status
    options: Mapping[str, str]
    figures: Mapping[str, float | None]
    model_bits: float | None
    identity: str

    def figure(self, name: str) -> float | None:
        """Returns a figure by its column's name."""
        return self.model_bits if name == "model_bits" else self.figures[name]

    def flat(self) -> dict[str, Any]:
        """Returns the row as plain values by column; swept options come after the point's number."""
        return {
            "point": self.number,
            "status": self.status.kind,
            **self.options,
            **self.figures,
            "model_bits": self.model_bits,
            "seconds": self.status.seconds,
            "identity": self.identity,
            "folder": self.status.folder,
            "line": self.status.line,
        }


def rows_of(sweep: Sweep) -> list[Row]:
    """Returns a row for every point as it stands now, in order."""
    rows = []
    for point in sweep.points:
        status = status_of(sweep.folder, point)
        chosen = dict(map(split, point.overrides))
        options = {key: chosen.get(key, "") for key in sweep.keys}
        metrics = metrics_of(status) if status.kind == DONE else None
        if status.kind == DONE and metrics is None:
            status = Status("failed", status.folder, "metrics.json is missing or damaged: run it again")
        rows.append(_row(point.number, status, options, metrics or {}))
    return rows


def write_table(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes ``points.csv``, ``points.parquet`` and ``points.json`` into the sweep's folder, each whole or not at all.

    ``points.json`` comes last: where it has these rows already, all three do.
    """
    flat = [row.flat() for row in rows]
    csv_file, parquet_file, json_file = (folder / f"points.{kind}" for kind in ("csv", "parquet", "json"))
    text = json.dumps(flat, indent=1) + "\n"
    if csv_file.is_file() and parquet_file.is_file() and _text_of(json_file) == text:
        return
    # With it comes pandas, which takes a second: a sweep that is finished writes nothing.
    import pyarrow
    import pyarrow.parquet

    types = {"whole": pyarrow.int64(), "number": pyarrow.float64(), "text": pyarrow.string()}
    names = list(dict.fromkeys(name for row in flat for name in row)) or list(COLUMNS)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(csv_file, buffer.getvalue())
    columns = {name: pyarrow.array([row[name] for row in flat], types[_kind(name)]) for name in names}
    write_atomic(parquet_file, lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path))
    write_text(json_file, text)


def _text_of(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def by_result(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with the least perplexity first; those without one come last, in order."""

    def place(row: Row) -> tuple[bool, float, int]:
        value = row.figures["quantized_perplexity"]
        return value is None, math.inf if value is None or math.isnan(value) else value, row.number

    return sorted(rows, key=place)


def without_effect(rows: Sequence[Row]) -> list[str]:
    """Returns swept options all of whose values gave the same figures, the other options being equal."""
    done = [row for row in rows if row.status.kind == DONE]
    found = []
    for key in dict.fromkeys(key for row in done for key in row.options):
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in done:
            groups.setdefault(tuple(v for k, v in row.options.items() if k != key), []).append(row)
        several = [group for group in groups.values() if len({row.options[key] for row in group}) > 1]
        if several and all(len({tuple(row.figures.values()) for row in group}) == 1 for group in several):
            found.append(key)
    return found


def _row(number: int, status: Status, options: Mapping[str, str], metrics: Mapping[str, Any]) -> Row:
    figures = figures_of(metrics)
    bits = figures.pop("model_bits")
    return Row(number, status, options, figures, bits, str(metrics.get("identity", "")))


def figures_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the figures of a row, `model_bits` among them, out of what metrics.json holds."""
    figures = {name: _number(_at(metrics, place)) for name, place in FIGURES.items()}
    parameters, size = _number(_at(metrics, ("size", "parameters"))), figures["bytes"]
    return {**figures, "model_bits": 8 * size / parameters if size is not None and parameters else None}


def _at(value: Any, place: Sequence[str]) -> Any:
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _kind(name: str) -> str:
    """Returns what a column holds: ``whole`` numbers, a ``number`` or ``text``."""
    if name == "point":
        return "whole"
    return "number" if name in {*FIGURES, "model_bits", "seconds"} else "text"
