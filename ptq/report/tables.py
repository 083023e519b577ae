"""The tables that end a run, for a terminal and for the log."""

from collections.abc import Mapping

from rich.table import Table

from ptq.config.schema import Recipe
from ptq.evaluation.comparison import Comparison
from ptq.evaluation.tasks.accuracy import TaskResult
from ptq.evaluation.token_statistics import Estimate, TokenStatistics
from ptq.report.plain import printable
from ptq.report.results import Beginnings, Facts, SharedText, Size, TensorKind

PERCENTILES = {
    "max": "max",
    "99.9%": "p99_9",
    "99%": "p99",
    "95%": "p95",
    "90%": "p90",
    "median": "median",
    "10%": "p10",
    "5%": "p5",
    "1%": "p1",
    "0.1%": "p0_1",
    "min": "min",
}


def result_table(recipe: Recipe, comparison: Comparison, facts: Facts) -> Table:
    """Returns the table of a run's main figures."""
    c, size, memory = comparison, facts.size, facts.memory
    device = (
        "" if memory.device_peak_bytes is None else f", CUDA {_gib(memory.device_peak_bytes)} in {memory.device_phase}"
    )
    rows = [
        ("baseline perplexity", f"{c.baseline_perplexity:.4f}  ({facts.baseline})"),
        ("quantized perplexity", f"{c.quantized_perplexity:.4f}  ({c.ratio:.4f} x, {facts.kernels.words})"),
        ("difference", f"{c.difference:+.4f}  {interval_words(c)}"),
        ("KL(baseline || quantized)", f"mean {c.kl_mean:.5f}, 99th percentile {c.kl_p99:.5f} nats a token"),
        ("top-1 agreement", f"{c.top1_agreement:.2%}"),
        (
            "bits per weight",
            f"{size.bits_per_weight:.3f}  ({size.quantized_parameters / size.parameters:.1%} of the parameters)",
        ),
        *_outliers(facts.outlier_share),
        *(
            []
            if facts.tuned is None
            else [("tuned", ", ".join(f"{name} {value:.4g}" for name, value in facts.tuned.items()))]
        ),
        ("size", f"{size.before_bytes / 1e6:.1f} MB -> {size.after_bytes / 1e6:.1f} MB{_untied(size)}"),
        ("tokens", f"{c.windows} windows, {c.tokens} targets, {facts.evaluation_source}, {_begun(facts.bos)}"),
        *_overlap(facts.overlap),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in facts.seconds.items())),
        ("peak memory", f"{_gib(memory.peak_bytes)} in {memory.phase}{device}"),
    ]
    result = Table(title=recipe.name, show_header=False, title_justify="left")
    for name, words in rows:
        result.add_row(name, printable(words))
    return result


def interval_words(comparison: Comparison) -> str:
    """Returns the interval of a difference of perplexities, and how much the windows know."""
    c = comparison
    if c.difference_low is None or c.difference_high is None:
        return "(one window: no interval)"
    few = f", Student's t: {c.windows} windows know little" if c.interval == "t" else ""
    return f"[{c.difference_low:+.4f}, {c.difference_high:+.4f}] at {c.confidence:.0%}{few}"


def token_table(statistics: TokenStatistics) -> Table:
    """Returns the columns of llama.cpp's perplexity tool: figures with their errors, KL and the right token's probability."""
    s = statistics
    table = Table(title="target by target, as llama.cpp's perplexity tool has it", title_justify="left")
    for column in ("", "value", "KL, nats", "delta p, %"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("PPL, quantized", _words(s.perplexity_quantized))
    table.add_row("PPL, baseline", _words(s.perplexity_baseline))
    table.add_row("correlation of ln PPL, %", _words(s.ln_perplexity_correlation, 100, 3))
    table.add_row("ln PPL ratio", _words(s.ln_perplexity_ratio, digits=5))
    table.add_row("PPL ratio", _words(s.perplexity_ratio, digits=5))
    table.add_row("PPL difference", _words(s.perplexity_difference))
    table.add_row("same top token, %", _words(s.same_top, 100, 2))
    table.add_row("mean", "", _words(s.kl.mean, digits=5), _words(s.delta_p.mean, 100, 3))
    table.add_row("RMS", "", "", _words(s.delta_p_rms, 100, 3))
    for name, field in PERCENTILES.items():
        table.add_row(name, "", f"{getattr(s.kl, field):.5f}", f"{100 * getattr(s.delta_p, field):.3f}")
    return table


def task_table(results: list[TaskResult], confidence: float) -> Table:
    """Returns the table of tasks: both models' accuracies, the difference with its interval, McNemar's p."""
    table = Table(title="tasks", title_justify="left")
    for column in (
        "task",
        "metric",
        "samples",
        "baseline",
        "quantized",
        f"difference and {confidence:.0%} interval",
        "lost",
        "won",
        "p",
        "prompts begin with",
    ):
        table.add_column(column, justify="left" if column in {"task", "metric", "prompts begin with"} else "right")
    for r in results:
        interval = f"{r.difference:+.2%} [{r.low:+.2%}, {r.high:+.2%}]"
        figures = (
            str(r.samples),
            f"{r.baseline:.2%}",
            f"{r.quantized:.2%}",
            interval,
            str(r.lost),
            str(r.won),
            f"{r.p:.4f}",
        )
        table.add_row(printable(r.task), printable(r.metric), *figures, printable(r.bos))
    return table


def tensor_table(kinds: list[TensorKind]) -> Table:
    """Returns the table of every kind of tensor with its format and its share of the parameters."""
    table = Table(title="tensors", title_justify="left")
    for column in ("tensor", "format"):
        table.add_column(column)
    for column in ("modules", "share of parameters"):
        table.add_column(column, justify="right")
    for kind in kinds:
        table.add_row(kind.tensor, kind.format, str(kind.modules or ""), f"{kind.share:.1%}" if kind.share else "")
    return table


def summary(metrics: Mapping[str, object]) -> str:
    """Returns what a finished run has found in one line, out of its metrics.json.

    Raises:
        KeyError: when a figure is missing.
        TypeError: when one is something else than a number or null.
    """
    size = metrics["size"]
    if not isinstance(size, Mapping):
        raise TypeError(f"size: {size!r} is no object")
    how = "simulated" if metrics["simulated"] else "integers"
    perplexities = f"{_figure(metrics['baseline_perplexity'], 4)} -> {_figure(metrics['quantized_perplexity'], 4)}"
    return (
        f"perplexity {perplexities} ({_figure(metrics['ratio'], 4)} x, {how}), KL {_figure(metrics['kl_mean'], 5)}, "
        f"{_figure(size['bits_per_weight'], 3)} bits per weight"
    )


def _figure(value: object, digits: int) -> str:
    """A figure of metrics.json, where null stands for one that is no finite number."""
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no figure")
    return f"{value:.{digits}f}"


def _words(estimate: Estimate, scale: float = 1, digits: int = 4) -> str:
    error = "" if estimate.error is None else f" ± {scale * estimate.error:.{digits}f}"
    return f"{scale * estimate.value:.{digits}f}{error}"


def _begun(bos: Beginnings) -> str:
    """Returns in words what begins the windows."""
    calibration, evaluation = (f"begun by {t}" if t else "no BOS" for t in (bos.calibration, bos.evaluation))
    return evaluation if calibration == evaluation else f"{evaluation} (calibration: {calibration})"


def _overlap(overlap: SharedText) -> list[tuple[str, str]]:
    words = f"{overlap.tokens} tokens of {overlap.windows} windows were calibrated on: allowed"
    return [("overlap", words)] if overlap.copied else []


def _outliers(share: float | None) -> list[tuple[str, str]]:
    return [] if share is None else [("outlier columns", f"{share:.2%} of an input's columns stay in floating point")]


def _untied(size: Size) -> str:
    return (
        ""
        if not size.untied_bytes
        else f", {size.untied_bytes / 1e6:.1f} MB of it for a head that is no longer the embedding"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
