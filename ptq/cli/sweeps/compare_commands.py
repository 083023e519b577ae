"""The command line ``ptq compare``: two runs on the same tokens, or all points of a sweep against one."""

import json
import pathlib
from typing import TYPE_CHECKING

from ptq.cli.parser import Parser
from ptq.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ptq.evaluation.paired import Paired
    from ptq.sweep.comparing import Run, RunPair

SHOWN = 10
"""Linears whose errors stand side by side on the screen; ``--json`` has them all."""


def compare_command(arguments: list[str], program: str) -> int:
    """``ptq compare RUN RUN`` or ``ptq compare SWEEP [--against POINT]``."""
    parser = Parser(
        prog=program, allow_abbrev=False, description="Compares runs on the same tokens, paired over windows."
    )
    parser.add_argument("folders", nargs="+", metavar="RUN", help="two runs' folders, or one sweep's")
    parser.add_argument("--against", metavar="POINT", help="of a sweep: a point's number, or best (best)")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the interval (0.95)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    if not 0 < given.confidence < 1:
        raise UserError(f"--confidence: {given.confidence} is not between 0 and 1: use 0.95")
    if len(given.folders) > 2:
        raise UserError(f"{given.folders[2]}: a third folder: give two runs, or one sweep")
    from ptq.report.plain import plain_console
    from ptq.sweep.comparing import compare_runs, read_run

    places = [pathlib.Path(folder).expanduser() for folder in given.folders]
    screen = plain_console()
    console = screen if screen.is_terminal else plain_console(width=140)
    if len(places) == 1:
        return _compare_sweep(places[0], given.against or "best", given.confidence, given.json, console)
    if given.against is not None:
        raise UserError("--against: is for a sweep: leave it out, the first run is what the second is compared with")
    pair = compare_runs(read_run(places[0]), read_run(places[1]), given.confidence)
    _show_pair(pair, given.confidence, given.json, console)
    return 0


COMMANDS = {"compare": ("two runs on the same tokens, or the points of a sweep, paired over windows", compare_command)}


def _show_pair(pair: "RunPair", confidence: float, as_text: bool, console: "Console") -> None:
    from rich.table import Table

    from ptq.report.plain import printable
    from ptq.sweep.comparing import as_json, changed_linears

    if as_text:
        print(json.dumps(as_json(pair), indent=2))
        return
    table = Table(show_header=True)
    for column in ("", "first", "second"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    table.add_row("run", *(printable(str(run.folder)) for run in (pair.first, pair.second)))
    rows = {
        "perplexity": ("quantized_perplexity", ".4f"),
        "KL to the baseline": ("kl_mean", ".5f"),
        "top-1 agreement": ("top1_agreement", ".2%"),
    }
    for words, (name, form) in rows.items():
        table.add_row(words, *(format(run.metrics[name], form) for run in (pair.first, pair.second)))
    table.add_row("bits per weight", *(_bits(run) for run in (pair.first, pair.second)))
    console.print(table)
    console.print(sentence(pair.paired, confidence))
    for note in pair.notes:
        console.print(f"note: {printable(note)}")
    changed = changed_linears(pair)
    if changed:
        better = sum(b < a for _, a, b in changed)
        linears = Table(
            title=f"output errors: {better} of {len(changed)} Linears less in the second; the greatest changes",
            title_justify="left",
        )
        for column in ("Linear", "first", "second", "times"):
            linears.add_column(column, justify="left" if column == "Linear" else "right")
        for name, a, b in changed[:SHOWN]:
            linears.add_row(printable(name), f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}" if a else "")
        console.print(linears)


def _compare_sweep(folder: pathlib.Path, chosen: str, confidence: float, as_text: bool, console: "Console") -> int:
    from rich.table import Table

    from ptq.report.plain import printable
    from ptq.sweep.comparing import against, as_json, read_run, select
    from ptq.sweep.display import describe
    from ptq.sweep.points import read_sweep
    from ptq.sweep.status import DONE
    from ptq.sweep.table import rows_of

    rows = {row.number: row for row in rows_of(read_sweep(folder)) if row.status.kind == DONE}
    runs = {number: read_run(pathlib.Path(row.status.folder)) for number, row in rows.items()}
    if len(runs) < 2:
        raise UserError(f"{folder}: {len(runs)} of its points are done: a comparison needs two")
    reference = select(list(runs), chosen, runs)
    found = against(runs, reference, confidence)
    if as_text:
        points = [{"point": number, "holm_p": p, **as_json(pair)} for number, pair, p in found]
        print(json.dumps({"reference": reference, "points": points}, indent=2))
        return 0
    table = Table(title=printable(f"against point {reference}: {describe(rows[reference])}"), title_justify="left")
    for column in (
        "point",
        "options",
        "perplexity",
        "log perplexity",
        f"{confidence:.0%} interval",
        "p",
        "p (Holm)",
        "KL",
        "detectable",
    ):
        table.add_column(column, justify="left" if column == "options" else "right", overflow="fold")
    for number, pair, p in found:
        d = pair.paired
        options = " ".join(f"{key}={value}" for key, value in rows[number].options.items() if value)
        perplexity, kl = pair.second.metrics["quantized_perplexity"], pair.second.metrics["kl_mean"]
        table.add_row(str(number), printable(options), f"{perplexity:.4f}", f"{d.difference:+.5f}", _interval(d), f"{d.p:.4f}", f"{p:.4f}", f"{kl:.5f}", _figure(d.detectable))  # fmt: skip
    console.print(table)
    if any(pair.paired.low is None for _, pair, _ in found):
        console.print(
            "note: all windows are of one document, or there is one: too few to say whether a difference is chance"
        )
    for note in dict.fromkeys(note for _, pair, _ in found for note in pair.notes):
        console.print(f"note: {printable(note)}")
    return 0


def sentence(found: "Paired", confidence: float) -> str:
    """Returns what the comparison says, in a sentence or two."""
    of = f"{found.windows} windows" + (f" of {found.clusters} documents" if found.clusters != found.windows else "")
    words = f"log perplexity, second less first: {found.difference:+.5f} nats a token"
    if found.low is None or found.high is None:
        return f"{words}; {of}: too few to say whether that is chance"
    clear = found.low > 0 or found.high < 0
    verdict = (
        f"the {'first' if found.difference > 0 else 'second'} is better"
        if clear
        else "no difference that these windows show"
    )
    return (
        f"{words} {_interval(found)} at {confidence:.0%}, p = {found.p:.4f} ({of}): {verdict}; "
        f"the least difference that they show four times out of five is {_figure(found.detectable)}"
    )


def _interval(found: "Paired") -> str:
    return "" if found.low is None else f"[{found.low:+.5f}, {found.high:+.5f}]"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _bits(run: "Run") -> str:
    return f"{run.metrics['size']['bits_per_weight']:.3f}"
