"""Any two runs on the same tokens, paired over windows; and the points of a sweep against one of them."""

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.errors import UserError
from ptq.evaluation.paired import Paired, holm, paired
from ptq.files.bounded import parse_json


@dataclass(frozen=True)
class Run:
    """What a finished run has left, as far as it is compared.

    Attributes:
        folder: the run's.
        metrics: what metrics.json holds.
        losses: mean loss of the quantized model on every window, nats a target.
        errors: relative output error of every quantized Linear by full name; None where no token reached it.
        documents: the document of every window; None where the run does not know.
    """

    folder: pathlib.Path
    metrics: Mapping[str, Any]
    losses: tuple[float, ...]
    errors: Mapping[str, float | None]
    documents: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RunPair:
    """Two runs beside each other: `notes` are sentences on what else differs between them than what was meant to."""

    first: Run
    second: Run
    paired: Paired
    notes: tuple[str, ...]


def read_run(folder: pathlib.Path) -> Run:
    """Returns the finished run in `folder`.

    Raises:
        UserError: when it holds none, or what cannot be read.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run: give a folder with metrics.json, outputs/<recipe>/<hash>")
    try:
        metrics = parse_json(path.read_text(encoding="utf-8"))
        losses = tuple(float(value) for value in metrics["window_losses"]["quantized"])
        baseline, documents = metrics["window_losses"]["baseline"], metrics.get("window_documents")
        documents = None if documents is None else tuple(map(int, documents))
        if any(len(found) != len(losses) for found in (baseline, losses if documents is None else documents)):
            raise ValueError("windows of unequal number")
        str(metrics["evaluation_fingerprint"]), float(metrics["size"]["bits_per_weight"])
        for name in ("kl_mean", "quantized_perplexity", "baseline_perplexity", "top1_agreement"):
            float(metrics[name])
        with (folder / "layers.csv").open(encoding="utf-8", newline="") as file:
            errors = {
                row["name"]: float(row["output_error"]) if row["output_error"] else None for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: metrics.json or layers.csv is damaged ({reason}): run it again") from None
    if not losses or not all(map(math.isfinite, losses)):
        raise UserError(
            f"{path}: window_losses: losses that are no numbers cannot be compared: run it again with more bits"
        )
    return Run(folder, metrics, losses, errors, documents)


def compare_runs(first: Run, second: Run, confidence: float = 0.95) -> RunPair:
    """Compares two runs, paired over the windows that both have evaluated.

    Raises:
        UserError: when they have evaluated different tokens; both fingerprints are named.
    """
    a, b = first.metrics, second.metrics
    if a["evaluation_fingerprint"] != b["evaluation_fingerprint"] or len(first.losses) != len(second.losses):
        raise UserError(
            f"{second.folder}: other tokens than {first.folder}: evaluation_fingerprint {_short(b['evaluation_fingerprint'])} "
            f"({b.get('evaluation_source')}, {len(second.losses)} windows), not {_short(a['evaluation_fingerprint'])} "
            f"({a.get('evaluation_source')}, {len(first.losses)} windows): evaluate both with the same data, windows and length"
        )
    documents = first.documents
    found = paired(first.losses, second.losses, documents, confidence)
    return RunPair(first, second, found, tuple(_notes(a, b, documents is not None)))


def against(runs: Mapping[int, Run], reference: int, confidence: float = 0.95) -> list[tuple[int, RunPair, float]]:
    """Compares every run of a sweep with the one of point `reference`.

    Returns:
        (point, the pair with the reference first, p corrected for the number of comparisons), the best first.
    """
    pairs = {
        number: compare_runs(runs[reference], run, confidence) for number, run in runs.items() if number != reference
    }
    corrected = holm([pair.paired.p for pair in pairs.values()])
    rows = [(number, pair, p) for (number, pair), p in zip(pairs.items(), corrected, strict=True)]
    return sorted(rows, key=lambda row: row[1].paired.difference)


def best_of(runs: Mapping[int, Run]) -> int:
    """Returns the point with the least perplexity, the first of equals."""
    return min(runs, key=lambda number: (sum(runs[number].losses), number))


def changed_linears(pair: RunPair) -> list[tuple[str, float, float]]:
    """Returns (Linear, its error in the first run, in the second) of those that both have, the greatest change first."""
    both = [
        (name, error, other)
        for name, error in pair.first.errors.items()
        if error is not None and (other := pair.second.errors.get(name)) is not None
    ]
    return sorted(both, key=lambda row: -abs(math.log(max(row[2], 1e-12) / max(row[1], 1e-12))))


def as_json(pair: RunPair) -> dict[str, Any]:
    """Returns a pair as plain containers."""
    p = pair.paired
    return {
        "first": str(pair.first.folder),
        "second": str(pair.second.folder),
        "log_perplexity_difference": p.difference,
        "low": p.low,
        "high": p.high,
        "p": p.p,
        "least_detectable": p.detectable,
        "windows": p.windows,
        "clusters": p.clusters,
        "perplexity": [pair.first.metrics["quantized_perplexity"], pair.second.metrics["quantized_perplexity"]],
        "kl_mean": [pair.first.metrics["kl_mean"], pair.second.metrics["kl_mean"]],
        "notes": list(pair.notes),
        "linears": [{"name": name, "first": a, "second": b} for name, a, b in changed_linears(pair)],
    }


def _notes(a: Mapping[str, Any], b: Mapping[str, Any], documents: bool) -> list[str]:
    notes = []
    if a.get("weight_fingerprint") != b.get("weight_fingerprint"):
        prints = f"{_short(a.get('weight_fingerprint'))} and {_short(b.get('weight_fingerprint'))}"
        notes.append(f"weight_fingerprint differs ({prints}): two models, each with a baseline and a KL of its own")
    elif a["window_losses"]["baseline"] != b["window_losses"]["baseline"]:
        notes.append("the baselines' losses differ: other arithmetic, threads or machine")
    if not documents:
        notes.append("which document a window is of is not known: windows are taken as independent")
    return notes


def _short(fingerprint: Any) -> str:
    return str(fingerprint)[:12]


def select(numbers: Sequence[int], chosen: str, runs: Mapping[int, Run]) -> int:
    """Returns the point that ``--against`` names: ``best``, or a number. Raises `UserError` for any other."""
    if chosen == "best":
        return best_of(runs)
    if not chosen.isdigit() or int(chosen) not in numbers:
        raise UserError(
            f"--against: {chosen!r} is no point that is done: use best or one of {', '.join(map(str, numbers))}"
        )
    return int(chosen)
