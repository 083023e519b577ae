"""What a benchmark leaves: JSON with everything, tables in Markdown, a picture."""

import json
import pathlib
from typing import Any

from ptq.files.atomic import ensure_folder, write_atomic, write_text

JSON, TABLE, PICTURE = "bench.json", "bench.md", "bench.png"


def write(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes the three files into `folder`.

    Raises:
        UserError: when they cannot be written.
    """
    ensure_folder(folder, "--output")
    write_text(folder / JSON, json.dumps(report, indent=2, default=str) + "\n")
    write_text(folder / TABLE, tables(report))
    write_atomic(folder / PICTURE, lambda path: _draw(path, report))


def tables(report: dict[str, Any]) -> str:
    """Returns the tables of a benchmark in Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items() if value is not None)
    lines = [
        f"{report['recipe']}: {machine}",
        "",
        "| task | side | median ms | tokens/s | over fp32 | spread |",
        "|---|---|---|---|---|---|",
    ]
    for f in report["figures"]:
        lines.append(
            f"| {f['task']} | {f['side']} | {1e3 * f['median']:.1f} | {f['tokens_a_second']:.1f} | {f['ratio']:.2f} x "
            f"| {f['least']:.2f} to {f['most']:.2f} |"
        )
    lines += [
        "",
        "| side | MB of weights | read a token / weights | s to load | peak MB | |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in report["sides"].items():
        loaded = report["loading"].get(name, {})
        cells = (
            _mega(side["weight_bytes"]),
            _mega(side["head_bytes"]),
            "" if side["read_over_weights"] is None else f"{side['read_over_weights']:.2f}",
            f"{loaded['seconds']:.2f}" if loaded else "",
            _mega(loaded.get("peak_bytes")),
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {side['note']} |")
    roof = report["roofline"]
    limits = ", ".join(f"{kind} {value / 1e9:.0f}" for kind, value in roof["operations"].items())
    lines += ["", f"This machine at best: 10^9 operations a second: {limits}; {roof['bandwidth'] / 1e9:.1f} GB/s read."]
    if report["linears"]:
        lines += [
            "",
            "Kernels were timed on one weight several times: where caches hold it they may be below what reading it from memory takes.",
        ]
        lines += ["", "| Linear | rows | least possible ms, from memory | kernels, ms |", "|---|---|---|---|"]
    for row in report["linears"]:
        times = ", ".join(
            f"{name} {ms:.3g}" for name, ms in sorted(row["milliseconds"].items(), key=lambda item: item[1])
        )
        lines.append(f"| {row['shape'][0]} x {row['shape'][1]} | {row['rows']} | {row['least']:.3g} | {times} |")
    return "\n".join(lines) + "\n"


def _mega(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _draw(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Draws each side's speed over the baseline's, a group of bars a task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(f["task"] for f in report["figures"]))
    sides = list(dict.fromkeys(f["side"] for f in report["figures"]))
    figure = Figure(figsize=(1.6 * len(tasks) + 3, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(sides))
    for number, side in enumerate(sides):
        mine = {f["task"]: f for f in report["figures"] if f["side"] == side}
        places = [i + (number - (len(sides) - 1) / 2) * width for i, task in enumerate(tasks) if task in mine]
        found = [mine[task] for task in tasks if task in mine]
        ends = [[f["ratio"] - f["least"] for f in found], [f["most"] - f["ratio"] for f in found]]
        axes.bar(places, [f["ratio"] for f in found], width, yerr=ends, capsize=2, label=side)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("times as fast as fp32")
    axes.set_title(report["recipe"])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
