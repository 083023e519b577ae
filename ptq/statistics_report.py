"""What statistics look like: a table of the most outlying links, and one picture of their channels' ranges."""

import pathlib

import torch
from rich.table import Table

from ptq.files import write_atomic
from ptq.statistics import Statistics


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
    table = Table(title=f"most outlying inputs of {statistics.provenance.model}", title_justify="left")
    table.add_column("Linear (first reader of its input)")
    for column in ("max / median", "channel", "min", "max", "std there"):
        table.add_column(column, justify="right")
    for name, ratio, channel in outlier_ratios(statistics)[:top]:
        s = statistics.inputs[name]
        figures = (s.min[channel], s.max[channel], s.std[channel])
        table.add_row(name, f"{ratio:.1f}", str(channel), *(f"{float(v):.3g}" for v in figures))
    return table


def save_picture(statistics: Statistics, path: pathlib.Path, panels: int = 4) -> None:
    """Draws the channel ranges of the most outlying inputs: min..max as a band, mean ± std inside it, one panel each (PNG)."""
    from matplotlib.figure import Figure

    rows = outlier_ratios(statistics)[:panels]
    figure = Figure(figsize=(11, 2.3 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (name, ratio, _) in zip(axes, rows, strict=True):
        s = statistics.inputs[name]
        channels = range(len(s.min))
        low, high, mean, std = (t.double().cpu().numpy() for t in (s.min, s.max, s.mean, s.std))
        axis.fill_between(channels, low, high, step="mid", color="#9ecae1", linewidth=0, label="min to max")
        axis.fill_between(
            channels, mean - std, mean + std, step="mid", color="#08519c", linewidth=0, label="mean ± std"
        )
        axis.axhline(0, color="0.3", linewidth=0.5)
        axis.set_title(f"{name}   max/median {ratio:.1f}", loc="left", fontsize=9)
        axis.set_xlim(0, len(s.min) - 1)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="upper right", fontsize=8, frameon=False, ncols=2)
    axes[-1].set_xlabel("input channel", fontsize=9)
    figure.suptitle(
        f"{statistics.provenance.model}: ranges of the most outlying Linear inputs", fontsize=10, x=0.01, ha="left"
    )
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
