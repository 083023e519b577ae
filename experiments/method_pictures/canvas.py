"""How the pictures look: 900 points wide, one or two panels, units on the axes, the legend beside the data, a few dozen kilobytes."""

import io
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from ptq.files.atomic import write_atomic
from ptq.report.layer_errors import COLOURS

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = COLOURS
PALE, DARK = "#9ecae1", "#08519c"
"""Ranges, and what lies inside them, as in the pictures of channels that every run draws."""
WIDTH, DPI = 9.0, 100
COLUMNS = 4
"""Words of a legend beside one another, at most."""
LETTERS = 48
"""Words of more letters take two lines under a panel of two."""
SHORT = 300
"""Ends of a logarithmic axis whose ratio is less have numbers between the powers of ten."""
TONES = 64
"""Colours of a file: lines and text need no more, and it is half as large."""


@dataclass(frozen=True)
class Drawn:
    """A picture, and the figures in it as lines for people."""

    figure: Figure
    lines: Sequence[str]


def panels(title: str, count: int = 2, height: float = 3.3, **share: Any) -> tuple[Figure, list[Axes]]:
    """Returns a figure with this title, and its panels from left to right; `share` as `Figure.subplots` has it."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False, **share)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(axis="y", which="major", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, axes


def label(axis: Axes, title: str, x: str, y: str = "") -> None:
    """Says what a panel and its axes are."""
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def legend(figure: Figure, *axes: Axes) -> None:
    """Puts a legend under the panels, or with several `axes` one under each of them, each word once."""
    for axis in axes:
        found: dict[str, Any] = {}
        for handle, words in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(words, handle)
        if not found:
            continue
        columns = COLUMNS if len(axes) == 1 or sum(map(len, found)) < LETTERS else COLUMNS // 2
        kind: dict[str, Any] = {"fontsize": 8, "frameon": False, "ncols": min(len(found), columns)}
        if len(axes) == 1:
            figure.legend(list(found.values()), list(found), loc="outside lower center", **kind)
        else:
            axis.legend(
                list(found.values()),
                list(found),
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                columnspacing=1.2,
                **kind,
            )


def percents(axis: Axes, which: str = "y") -> None:
    """Writes the ticks of an axis, which has shares, in percent."""
    ticks = axis.yaxis if which == "y" else axis.xaxis
    ticks.set_major_formatter(FuncFormatter(_percent))
    if ticks.get_scale() == "log":
        low, high = ticks.get_view_interval()
        # Between the powers of ten of a longer axis there is no room.
        ticks.set_minor_formatter(FuncFormatter(_leading) if high < SHORT * low else NullFormatter())


def plain_logs(axis: Axes, which: str = "y") -> None:
    """Writes the powers of ten of a logarithmic axis as plain numbers."""
    ticks = axis.yaxis if which == "y" else axis.xaxis
    low, high = ticks.get_view_interval()
    ticks.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    ticks.set_minor_formatter(FuncFormatter(_leading_plain) if high < SHORT * low else NullFormatter())


def save(drawn: Drawn, path: pathlib.Path) -> None:
    """Writes the picture as a PNG."""
    full = io.BytesIO()
    drawn.figure.savefig(full, format="png", dpi=DPI)
    with Image.open(full) as image:
        small = image.convert("RGB").quantize(TONES, dither=Image.Dither.NONE)
    write_atomic(path, lambda place: small.save(place, format="PNG", optimize=True))


def _percent(value: float, position: int | None = None) -> str:
    return f"{100 * value:g} %"


def _leading(value: float, position: int | None = None) -> str:
    return _percent(value) if f"{value:e}"[0] in "25" else ""


def _leading_plain(value: float, position: int | None = None) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
