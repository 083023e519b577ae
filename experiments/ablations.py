"""Runs shipped ablations and writes what they found: ``python -m experiments.ablations smooth_alpha ranges [key=value ...]``.

Each is the command ``python main.py --ablation NAME key=value ...``; what is finished is not run again. Its section of
docs/ablations.md (the command, its main picture, a sentence, the table) is written anew, the others stay.
"""

import argparse
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from experiments.sweep_picture import draw
from ptq.cli.sweeps.ablations import ablation_named
from ptq.errors import UserError
from ptq.sweep.comparing import RunPair, against, best_of, read_run
from ptq.sweep.points import Sweep, read_sweep
from ptq.sweep.status import DONE
from ptq.sweep.table import Row, by_result, rows_of

HEADING = "# What the shipped ablations found\n\nEach section is written by `python -m experiments.ablations NAME ...` with the overrides of its command.\n"  # fmt: skip
MORE_BITS = 1.02
"""Bits a weight over the least of all points above which a finding has to speak of them."""
TELLS = 0.05
"""Least p, corrected for the number of points, at which two points are not told apart."""


def section_of(name: str, command: str, sweep: Sweep, picture: str) -> str:
    """Returns an ablation's section in Markdown. Raises `UserError` where no point is done."""
    rows = by_result(rows_of(sweep))
    done = [row for row in rows if row.status.kind == DONE]
    if not done:
        raise UserError(f"{sweep.folder}: no point is done: run ptq sweep resume first")
    lines = [f"## {name}", "", f"    {command}", "", f"![{name}]({picture})", "", finding(done), ""]
    keys = sweep.keys
    lines.append(
        f"| {' | '.join(f'`{key}`' for key in keys)} | perplexity | difference, 95% interval | mean KL | bits a weight |"
    )
    lines.append("|---" * (len(keys) + 4) + "|")
    lines += [_line(row, keys) for row in done]
    missing = [f"{_words(row)}: {row.status.kind} ({row.status.line})" for row in rows if row.status.kind != DONE]
    return "\n".join([*lines, *(["", "Not done: " + "; ".join(missing) + "."] if missing else []), ""])


def finding(done: Sequence[Row]) -> str:
    """Returns in words which of the finished points is best, and which of the others are told apart from it."""
    runs = {row.number: read_run(pathlib.Path(row.status.folder)) for row in done}
    best = best_of(runs)
    rows = {row.number: row for row in done}
    baseline = rows[best].figures["baseline_perplexity"]
    text = f"Best is {_words(rows[best])}: {rows[best].figures['quantized_perplexity']:.3f} (baseline {baseline:.3f})."
    bits = {row.number: bits for row in done if (bits := row.figures["bits_per_weight"]) is not None}
    if best in bits and (most := max(bits.values())) > MORE_BITS * (least := min(bits.values())):
        text += f" It has {bits[best]:.2f} bits a weight, and the points have {least:.2f} to {most:.2f}: read it beside them."
    compared: list[tuple[int, RunPair, float]] = against(runs, best) if len(runs) > 1 else []
    worse = [(number, pair, p) for number, pair, p in compared if p < TELLS]
    alike = [number for number, _, p in compared if p >= TELLS]
    if worse:
        said = ", ".join(f"{_words(rows[number])} by {pair.paired.difference:.1%}" for number, pair, _ in worse)
        text += f" Worse, paired over {compared[0][1].paired.windows} windows (log perplexity, p < {TELLS} after Holm): {said}."
    if alike and (few := too_few(compared)):
        return f"{text} {few}"
    if alike:
        text += f" Not told apart from it: {', '.join(_words(rows[number]) for number in alike)}."
    return text


def too_few(compared: Sequence[tuple[int, RunPair, float]]) -> str:
    """Returns a sentence for windows of which no difference, however great, could be told from chance among so many points; else ''."""
    paired = compared[0][1].paired
    least = min(1.0, 2.0 ** (1 - paired.clusters) * len(compared))
    if least < TELLS:
        return ""
    return (
        f"{paired.windows} windows of {paired.clusters} documents are too few to tell {len(compared) + 1} points apart: p is "
        f"{least:.2g} at least after Holm."
    )


def with_section(text: str, name: str, section: str) -> str:
    """Returns a document with the section of that name in the place of the old one, or at its end."""
    text = text or HEADING
    kept = re.split(r"(?m)^(?=## )", text)
    head, others = (
        kept[0].rstrip("\n"),
        {part.splitlines()[0].removeprefix("## "): part.strip("\n") for part in kept[1:]},
    )
    others[name] = section.strip("\n")
    return "\n\n".join([head, *others.values()]) + "\n"


def run_ablation(name: str, overrides: Sequence[str], docs: pathlib.Path) -> None:
    """Runs one ablation and writes its section and its picture. Raises `UserError` for one that is none, or that leaves no sweep."""
    ablation_named(name)
    words, name = ["main.py", "--ablation", name, *overrides], pathlib.PurePath(name).stem
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    found = re.findall(r"\S*outputs\S*/sweeps/\S+/[0-9a-f]{12}", done.stdout)
    if not found:
        raise UserError(f"{name}: left no sweep (exit status {done.returncode})")
    sweep = read_sweep(pathlib.Path(found[-1]))
    picture = docs / "ablations" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    rows = [row.flat() for row in rows_of(sweep)]
    draw(rows, sweep.keys, max(sweep.keys, key=lambda key: len({row[key] for row in rows})), picture)
    page = docs / "ablations.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    section = section_of(name, shlex.join(["python", *words]), sweep, f"ablations/{name}.png")
    page.write_text(with_section(text, name, section), encoding="utf-8")
    print(f"{name}: {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the ablations that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="NAME",
        help="ablations, shipped or a .yaml file's, and overrides key=value of all of them",
    )
    parser.add_argument("--docs", type=pathlib.Path, default=pathlib.Path("docs"))
    given = parser.parse_args(arguments)
    overrides = [word for word in given.words if "=" in word]
    try:
        for name in (word for word in given.words if "=" not in word):
            run_ablation(name, overrides, given.docs)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def _line(row: Row, keys: Sequence[str]) -> str:
    f: Mapping[str, float | None] = row.figures
    interval = "" if f["difference_low"] is None else f" [{f['difference_low']:+.3f}, {f['difference_high']:+.3f}]"
    options = " | ".join(str(row.options[key]) for key in keys)
    bits = "" if f["bits_per_weight"] is None else f"{f['bits_per_weight']:.3f}"
    return f"| {options} | {f['quantized_perplexity']:.3f} | {f['difference']:+.3f}{interval} | {f['kl_mean']:.4f} | {bits} |"


def _words(row: Row) -> str:
    return " ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.options.items() if value != "")


if __name__ == "__main__":
    main()
