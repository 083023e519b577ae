"""The picture that every run has: each Linear's error, block by block."""

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.report.figure import save_figure
from ptq.report.plain import plain_text
from ptq.report.results import LayerResult

DECADE = 10
"""Greatest over least value from which on an axis is logarithmic."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, told apart by people who see few of them."""
MARKERS = "os^Dv<>"


@dataclass(frozen=True)
class LinearKind:
    """The Linears of one name in all blocks: `points` are (number of the block, error); experts share one kind."""

    name: str
    points: tuple[tuple[int, float], ...]


def linear_kinds(layers: Sequence[LayerResult]) -> list[LinearKind]:
    """Returns the output errors of the Linears by their name inside a block, in the order in which these come first.

    Linears that no token reached are left out. A number inside the block (an expert's) becomes ``*``.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdecimal()]
        block, rest = (int(parts[places[0]]), parts[places[0] + 1 :]) if places else (0, parts)
        kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", ".".join(rest))
        if layer.output_error is not None:
            found.setdefault(kind, []).append((block, layer.output_error))
    return [LinearKind(name, tuple(points)) for name, points in found.items()]


def save_errors(layers: Sequence[LayerResult], title: str, path: pathlib.Path) -> bool:
    """Draws every Linear's output error over the number of its block (PNG); returns False where there is none to draw.

    A line connects the mean of a kind in each block; on a logarithmic axis errors of zero are left out, which the title says.
    """
    kinds = linear_kinds(layers)
    errors = [error for kind in kinds for _, error in kind.points]
    positive = [error for error in errors if error > 0]
    if not errors:
        return False
    logarithmic = bool(positive) and max(positive) >= DECADE * min(positive)
    left_out = len(errors) - len(positive) if logarithmic else 0
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, kind in enumerate(kinds):
        colour = COLOURS[i % len(COLOURS)]
        points = [(block, 100 * error) for block, error in kind.points if error > 0 or not logarithmic]
        if not points:
            continue
        blocks = sorted({block for block, _ in points})
        of_block = [[error for at, error in points if at == block] for block in blocks]
        means = [sum(values) / len(values) for values in of_block]
        # Beyond as many kinds as there are colours the lines are dashed: the markers alone would tell them apart no more.
        style = ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
        axis.plot(
            blocks, means, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.2, linestyle=style,
            label=plain_text(kind.name),
        )  # fmt: skip
        if len(points) > len(blocks):
            places, errors_there = zip(*points, strict=True)
            axis.scatter(places, errors_there, color=colour, s=5, alpha=0.35, linewidths=0)
    if logarithmic:
        axis.set_yscale("log")
        # Also a range of less than two decades has some numbers beside it. Of the ticks between, those that may have one: each takes time.
        axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axis.yaxis.set_minor_formatter(FuncFormatter(_minor(max(positive) / min(positive))))
    else:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(FuncFormatter(_percent))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("block", fontsize=9)
    axis.set_ylabel("output error, % of the output's norm", fontsize=9)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(axis="y", which="major", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    missing = f" ({left_out} of {len(errors)} Linears have no error, and no point)" if left_out else ""
    figure.suptitle(plain_text(f"{title}: error of each Linear's output{missing}"), fontsize=10, x=0.01, ha="left")
    save_figure(figure, path)
    return True


def _percent(value: float, position: int | None = None) -> str:
    return f"{value:g} %"


def _minor(span: float):  # type: ignore[no-untyped-def]
    """Labels the minor ticks 2 and 5 of an axis that spans less than three decades."""

    def label(value: float, position: int | None = None) -> str:
        leading = f"{value:e}"[0]
        return _percent(value) if span < 1000 and leading in "25" else ""

    return label
