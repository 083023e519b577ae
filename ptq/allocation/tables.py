"""What a sensitivity looks like: tables for the terminal, a CSV file, a heat map of blocks and Linears."""

import csv
import io
import pathlib
import re
from collections.abc import Mapping

from rich.table import Table

from ptq.allocation.sensitivity import Sensitivity
from ptq.files.atomic import write_text
from ptq.report.figure import save_figure
from ptq.report.plain import plain_text, printable

HURT_MOST = 10
"""Linears that the terminal names; the CSV file has all."""
DECADES = 6
"""Of the colours of the heat map: what costs less than the greatest by more is drawn as the least."""


def place_of(name: str) -> tuple[int, str]:
    """Returns the number of a Linear's block and its name inside the block, with ``*`` for the number of an expert."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    block, rest = (0, parts) if at is None else (int(parts[at]), parts[at + 1 :])
    return block, re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", ".".join(rest))


def tables_of(found: Sensitivity, checked: Mapping[str, Mapping[str, float]] | None = None) -> list[Table]:
    """Returns what the terminal shows: all Linears in one format, kinds of Linears, and the Linears that hurt most.

    Args:
        found: the sensitivity.
        checked: one-at-a-time KL by Linear and format, where it was measured.
    """
    from ptq.allocation.one_at_a_time import rank_correlation

    formats = list(found.formats)
    whole = _table("all Linears in one format", ["format", "bits per weight", "predicted KL"])
    if checked is not None:
        whole.add_column("one at a time, summed", justify="right")
        whole.add_column("rank correlation", justify="right")
    for form in formats:
        more = []
        if checked is not None:
            more = [f"{sum(costs[form] for costs in checked.values()):.5f}", f"{rank_correlation(found.costs, checked, form):.3f}"]  # fmt: skip
        whole.add_row(form, f"{found.uniform_bits(form):.3f}", f"{found.uniform_cost(form):.5f}", *more)
    kinds = _table("predicted KL by kind of Linear, all blocks, nats a token", ["Linear", "parameters", *formats])
    for kind, names in _kinds(found).items():
        size = sum(found.shapes[name][0] * found.shapes[name][1] for name in names)
        kinds.add_row(printable(kind), str(size), *(f"{sum(found.costs[n][f] for n in names):.5f}" for f in formats))
    worst = sorted(found.costs, key=lambda name: -max(found.costs[name].values()))[:HURT_MOST]
    most = _table("the Linears that hurt most", ["Linear", *formats])
    for name in worst:
        most.add_row(printable(name), *(f"{found.costs[name][form]:.2e}" for form in formats))
    return [whole, kinds, most]


def save_csv(found: Sensitivity, path: pathlib.Path, checked: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Writes a row for each Linear and format: what it takes and what it costs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [] if checked is None else ["one_at_a_time_kl"]
    writer.writerow(["block", "linear", "name", "parameters", "format", "bits_per_weight", "predicted_kl", *more])
    for name, costs in found.costs.items():
        block, kind = place_of(name)
        size = found.shapes[name][0] * found.shapes[name][1]
        for form, cost in costs.items():
            extra = [] if checked is None else [checked.get(name, {}).get(form, "")]
            writer.writerow([block, kind, name, size, form, found.bits(name, form), cost, *extra])
    write_text(path, text.getvalue())


def save_picture(found: Sensitivity, title: str, path: pathlib.Path) -> None:
    """Draws a heat map of blocks and Linears for each format (PNG), all in one scale of colours; experts of a block are summed."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    formats, kinds = list(found.formats), list(_kinds(found))
    blocks = sorted({place_of(name)[0] for name in found.costs})
    values = np.zeros((len(formats), len(kinds), len(blocks)))
    for name, costs in found.costs.items():
        block, kind = place_of(name)
        values[:, kinds.index(kind), blocks.index(block)] += [costs[form] for form in formats]
    positive = values[values > 0]
    most = float(positive.max()) if positive.size else 1.0
    least = max(most * 10.0**-DECADES, float(positive.min()) if positive.size else 0.1)
    least = min(least, most / 10)
    norm = LogNorm(least, most)
    height = 0.9 + len(formats) * (0.45 + 0.17 * len(kinds))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(formats), 1, squeeze=False, sharex=True)[:, 0]
    for axis, form, grid in zip(axes, formats, values, strict=True):
        image = axis.imshow(
            grid.clip(min=least), norm=norm, cmap="cividis", aspect="auto", interpolation="nearest",
            extent=(blocks[0] - 0.5, blocks[-1] + 0.5, len(kinds) - 0.5, -0.5),
        )  # fmt: skip
        axis.set_yticks(range(len(kinds)), [plain_text(kind) for kind in kinds], fontsize=7)
        axis.set_title(
            f"{form}, {found.uniform_bits(form):.2f} bits: {found.uniform_cost(form):.3g} in all", fontsize=8
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("block", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8)
    bar.set_label("predicted KL, nats a token", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(plain_text(f"{title}: what rounding each weight costs"), fontsize=10, x=0.01, ha="left")
    save_figure(figure, path)


def _kinds(found: Sensitivity) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in found.costs:
        kinds.setdefault(place_of(name)[1], []).append(name)
    return kinds


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in {"Linear", "format"} else "right", overflow="fold")
    return table
