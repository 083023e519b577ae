"""What statistics look like: a table of the most outlying links, and one picture of their channels' ranges."""

import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from group_methods.reorder import expand, ranges_of
from ptq.calibration.statistics import ChannelStatistics, Statistics
from ptq.files.atomic import write_text
from ptq.report.figure import save_figure
from ptq.report.plain import plain_text, printable

LINKS, PLACES = 3, 256
"""How many links' ranges ``channels.json`` holds, and in how many places at most: enough to look at."""


def outlier_ratios(statistics: Statistics) -> list[tuple[str, float, int]]:
    """Returns (Linear, max/median of per-channel absmax, channel of the max), most outlying first, one row for each tensor.

    Linears that read the same tensor (same figures) appear once, under the first one's name.
    """
    rows: dict[int, tuple[str, float, int]] = {}
    seen: list[tuple[str, torch.Tensor]] = []
    for name, s in statistics.inputs.items():
        if seen and torch.equal(seen[-1][1], s.absmax):
            continue
        seen.append((name, s.absmax))
        median = s.absmax.median().clamp_min(torch.finfo(torch.float32).tiny)
        rows[len(rows)] = (name, float(s.absmax.max() / median), int(s.absmax.argmax()))
    return sorted(rows.values(), key=lambda row: -row[1])


def outlier_table(statistics: Statistics, top: int = 10) -> Table:
    """Returns a table of the `top` most outlying Linear inputs."""
    table = Table(title=printable(f"most outlying inputs of {statistics.provenance.model}"), title_justify="left")
    table.add_column("Linear (first reader of its input)")
    for column in ("max / median", "channel", "min", "max", "std there"):
        table.add_column(column, justify="right")
    for name, ratio, channel in outlier_ratios(statistics)[:top]:
        s = statistics.inputs[name]
        figures = (s.min[channel], s.max[channel], s.std[channel])
        table.add_row(name, f"{ratio:.1f}", str(channel), *(f"{float(v):.3g}" for v in figures))
    return table


def save_picture(statistics: Statistics, path: pathlib.Path, panels: int = 4) -> None:
    """Draws the channel ranges of the most outlying inputs, one panel each (PNG)."""
    rows = [
        (f"{name}   max/median {ratio:.1f}", statistics.inputs[name]) for name, ratio, _ in outlier_ratios(statistics)
    ]
    title = f"{statistics.provenance.model}: ranges of the most outlying Linear inputs"
    _draw(path, title, [_Panel(words, figures) for words, figures in rows[:panels]])


def save_transformed(
    before: Statistics, after: Statistics, labels: Mapping[str, torch.Tensor], path: pathlib.Path
) -> None:
    """Draws the most outlying input before the transforms and after them, with a band for the range of each cluster (PNG).

    The ranges of the `LINKS` most outlying ones go into a JSON file of the same name, for the page of a sweep.

    Args:
        before: statistics as they were taken.
        after: as the transforms have rewritten them.
        labels: clusters of input channels by full name of the Linear, where there are some.
        path: the picture's file.
    """
    changed = [
        row for row in outlier_ratios(before) if before.inputs[row[0]] is not after.inputs[row[0]] or row[0] in labels
    ]
    if not changed:
        return
    name = changed[0][0]
    panels = [
        _Panel(f"{name}   before, max/median {_ratio(before.inputs[name]):.1f}", before.inputs[name]),
        _Panel(f"after, max/median {_ratio(after.inputs[name]):.1f}", after.inputs[name], labels.get(name)),
    ]
    _draw(path, f"{before.provenance.model}: channel ranges before and after the transforms", panels)
    links = [_link(name, before.inputs[name], after.inputs[name]) for name, *_ in changed[:LINKS]]
    write_text(path.with_suffix(".json"), json.dumps({"links": links}, separators=(",", ":")) + "\n")


def _link(name: str, before: ChannelStatistics, after: ChannelStatistics) -> dict[str, Any]:
    """Returns the ranges of an input before and after, in at most `PLACES` places: each the widest of `step` channels."""
    step = math.ceil(len(before.min) / PLACES)

    def pooled(figures: ChannelStatistics) -> dict[str, list[float]]:
        low = [float(f"{float(part.min()):.4g}") for part in figures.min.float().split(step)]
        high = [float(f"{float(part.max()):.4g}") for part in figures.max.float().split(step)]
        return {"low": low, "high": high}

    return {"name": name, "step": step, "before": pooled(before), "after": pooled(after)}


DECADE = 10
"""Widest over median channel from which on an axis is logarithmic."""


@dataclass(frozen=True)
class _Panel:
    title: str
    figures: ChannelStatistics
    labels: torch.Tensor | None = None


def _ratio(s: ChannelStatistics) -> float:
    return float(s.absmax.max() / s.absmax.median().clamp_min(torch.finfo(torch.float32).tiny))


def _draw(path: pathlib.Path, title: str, panels: list[_Panel]) -> None:
    """Draws min..max of every channel as a bar, mean ± std inside it, and under them the range of each cluster.

    Where the widest channel is `DECADE` medians wide, the axis is logarithmic beyond the median channel, to both sides of zero.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.3 * len(panels) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    drawn: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        s = panel.figures
        low, high, mean, std = (t.double().cpu().numpy() for t in (s.min, s.max, s.mean, s.std))
        edges = [channel - 0.5 for channel in range(len(low) + 1)]
        if panel.labels is not None:
            ends = (expand(panel.labels, end).cpu().numpy() for end in ranges_of(panel.labels, s.min, s.max))
            below, above = ends
            drawn["its cluster's range"] = _band(axis, edges, below, above, facecolor="#fdd0a2", linewidth=0)
        # A line around a bar keeps it visible where a channel is narrower than a point of the picture.
        drawn["min to max"] = _band(axis, edges, low, high, facecolor="#9ecae1", linewidth=0.3)
        drawn["mean ± std"] = _band(axis, edges, mean - std, mean + std, facecolor="#08519c", linewidth=0.3)
        axis.axhline(0, color="0.3", linewidth=0.5)
        words = panel.title
        least, most = float((mean - std).min()), float((mean + std).max())
        least, most = min(least, float(low.min()), 0.0), max(most, float(high.max()), 0.0)
        room = 0.05 * (most - least) or 1.0  # A bar that ends at the frame looks cut off.
        axis.set_ylim(least - room, most + room)
        if _ratio(s) >= DECADE:
            axis.set_yscale("symlog", linthresh=float(s.absmax.median().clamp_min(torch.finfo(torch.float32).tiny)))
            _room(axis, least, most)
            words += "   (linear to the median channel, logarithmic beyond)"
        axis.set_title(plain_text(words), loc="left", fontsize=9)
        axis.set_xlim(edges[0], edges[-1])
        axis.tick_params(labelsize=8)
        axis.set_ylabel("input value", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("input channel", fontsize=9)
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower right", fontsize=8, frameon=False, ncols=3)
    figure.suptitle(plain_text(title), fontsize=10, x=0.01, ha="left")
    save_figure(figure, path)


def _band(axis: Any, edges: list[float], low: Any, high: Any, **style: Any) -> Any:
    """Fills what lies between `low` and `high` (channels,), as `axis.stairs` does, but leaves the axis's limits alone: these are set, and
    taking them from a thousand channels one by one was most of a picture's time.
    """
    from matplotlib.patches import StepPatch

    return axis.add_artist(StepPatch(high, edges, baseline=low, fill=True, **style))


def _room(axis: Any, low: float, high: float) -> None:
    """Gives a symmetric logarithmic axis room beyond `low` and `high`, and some four ticks to each side of zero, powers of ten."""
    from matplotlib.ticker import FixedLocator, NullLocator

    least = axis.yaxis.get_transform().linthresh
    axis.set_ylim(min(1.5 * low, -0.5 * least), max(1.5 * high, 0.5 * least))
    first, last = math.ceil(math.log10(least)), math.floor(math.log10(max(-low, high, 10 * least)))
    powers = [10.0**power for power in range(first, last + 1, max(1, (last - first + 3) // 4))]
    ticks = (
        [-power for power in powers if -power >= 1.5 * low] + [0.0] + [power for power in powers if power <= 1.5 * high]
    )
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
