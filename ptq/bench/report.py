"""What a benchmark leaves: JSON with everything, tables in Markdown, a picture."""

import json
import pathlib
from typing import Any

from ptq.files.atomic import ensure_folder, write_text
from ptq.report.figure import save_figure

JSON, TABLE, PICTURE = "bench.json", "bench.md", "bench.png"


def write(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes the three files into `folder`.

    Raises:
        UserError: when they cannot be written.
    """
    ensure_folder(folder, "--output")
    write_text(folder / JSON, json.dumps(report, indent=2, default=str) + "\n")
    write_text(folder / TABLE, tables(report))
    _draw(folder / PICTURE, report)


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
    lines += _energy_table(report["joules_a_token"])
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
    lines += _step_table(report["decode_step"])
    if report["linears"]:
        lines += [
            "",
            "Kernels were timed with other memory read in between, 128 times the weight or 64 MiB: what caches still hold of it may take less.",
        ]
        lines += ["", "| Linear | rows | least possible ms, from memory | kernels, ms |", "|---|---|---|---|"]
    for row in report["linears"]:
        times = ", ".join(
            f"{name} {ms:.3g}" for name, ms in sorted(row["milliseconds"].items(), key=lambda item: item[1])
        )
        lines.append(f"| {row['shape'][0]} x {row['shape'][1]} | {row['rows']} | {row['least']:.3g} | {times} |")
    return "\n".join(lines) + "\n"


def _energy_table(joules: dict[str, dict[str, float]]) -> list[str]:
    """Returns the energy a token in Markdown, nothing where the machine does not tell."""
    if not joules:
        return []
    sides = list(next(iter(joules.values())))
    lines = [
        "",
        "Millijoules a token, idle power in them:",
        "",
        f"| task | {' | '.join(sides)} |",
        "|---|" + "---|" * len(sides),
    ]
    for task, found in joules.items():
        cells = (f"{1e3 * found[side]:.2f}" if side in found else "" for side in sides)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def _step_table(steps: dict[str, dict[str, float]]) -> list[str]:
    """Returns where a decoded token's time goes, in Markdown."""
    if not steps:
        return []
    parts = list(next(iter(steps.values())))
    lines = ["", "Where a token's time goes at batch 1, ms (measured with hooks, which add some):", ""]
    lines += [f"| side | {' | '.join(parts)} |", "|---|" + "---|" * len(parts)]
    return lines + [f"| {side} | {' | '.join(f'{ms[part]:.2f}' for part in parts)} |" for side, ms in steps.items()]


def _mega(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _draw(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Draws each side's speed over the baseline's, a group of bars a task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(f["task"] for f in report["figures"]))
    sides = list(dict.fromkeys(f["side"] for f in report["figures"]))
    steps = report["decode_step"]
    figure = Figure(figsize=(1.6 * len(tasks) + (7 if steps else 3), 4), layout="constrained")
    axes, *others = figure.subplots(
        1, 2 if steps else 1, squeeze=False, width_ratios=[1.6 * len(tasks) + 1, 4] if steps else None
    )[0]
    if others:
        _draw_steps(others[0], steps)
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
    save_figure(figure, path, dpi=120)


def _draw_steps(axes: Any, steps: dict[str, dict[str, float]]) -> None:
    """Draws where a token's time goes, a bar a side."""
    for part in next(iter(steps.values())):
        mine = [ms[part] for ms in steps.values()]
        below = [sum(list(ms.values())[: list(ms).index(part)]) for ms in steps.values()]
        axes.bar(list(steps), mine, 0.6, bottom=below, label=part)
    axes.set_ylabel("ms a token")
    axes.set_title("decoding one sequence")
    axes.legend(frameon=False)
