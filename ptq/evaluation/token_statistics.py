"""The columns of llama.cpp's perplexity tool (METHODS.md 6c): means over tokens with their errors, and percentiles.

Errors are standard errors that take tokens for independent, as that tool's do: tokens of one text are not, so they are too
small, and the interval over windows (`ptq.evaluation.interval`) is what to decide by.
"""

import math
from dataclasses import dataclass

import torch

from ptq.evaluation.token_comparison import TokenComparison

PERCENTILES = {
    "p99_9": 99.9, "p99": 99, "p95": 95, "p90": 90, "median": 50, "p10": 10, "p5": 5, "p1": 1, "p0_1": 0.1,
}  # fmt: skip
"""Fields of a `Distribution`, and which percentile each is."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error.

    Attributes:
        value: the figure.
        error: its standard error over tokens; null for a single token.
    """

    value: float
    error: float | None


@dataclass(frozen=True)
class Distribution:
    """How a figure is spread over tokens; percentiles are interpolated linearly.

    Attributes:
        mean: mean over tokens.
        max: the greatest.
        p99_9: the 99.9th percentile.
        p99: the 99th percentile.
        p95: the 95th percentile.
        p90: the 90th percentile.
        median: the 50th percentile.
        p10: the 10th percentile.
        p5: the 5th percentile.
        p1: the 1st percentile.
        p0_1: the 0.1th percentile.
        min: the least.
    """

    mean: Estimate
    max: float
    p99_9: float
    p99: float
    p95: float
    p90: float
    median: float
    p10: float
    p5: float
    p1: float
    p0_1: float
    min: float


@dataclass(frozen=True)
class TokenStatistics:
    """What llama.cpp's perplexity tool prints of two models on the same text, target by target.

    Attributes:
        perplexity_quantized: exp of the quantized model's mean loss.
        perplexity_baseline: exp of the baseline's mean loss.
        ln_perplexity_correlation: correlation of the two models' losses over tokens, -1 to 1; null where one has the same
            loss everywhere. The error is (1 - r^2) / sqrt(tokens - 1), which llama.cpp does not print.
        ln_perplexity_ratio: mean loss of the quantized model less the baseline's, in nats.
        perplexity_ratio: quantized over baseline.
        perplexity_difference: quantized less baseline.
        kl: KL(baseline || quantized), in nats.
        delta_p: the right token's probability, quantized less baseline, as a share of 1.
        delta_p_rms: root of the mean square of `delta_p`.
        same_top: share of tokens at which both find the same token the most likely.
    """

    perplexity_quantized: Estimate
    perplexity_baseline: Estimate
    ln_perplexity_correlation: Estimate
    ln_perplexity_ratio: Estimate
    perplexity_ratio: Estimate
    perplexity_difference: Estimate
    kl: Distribution
    delta_p: Distribution
    delta_p_rms: Estimate
    same_top: Estimate


def token_statistics(tokens: TokenComparison) -> TokenStatistics:
    """Returns the statistics of a comparison; those of losses that overflow are inf or nan."""
    count, p, q = tokens.kl.numel(), tokens.baseline, tokens.quantized
    before, after, ratio = _mean(p), _mean(q), _mean(q - p)
    ppl, ppl_before = _exp(after), _exp(before)
    covariance = float(((p - p.mean()) * (q - q.mean())).sum()) / (count - 1) / count if count > 1 else math.nan
    delta_p = (-q).exp() - (-p).exp()
    square = _mean(delta_p.square())
    rms = math.sqrt(square.value)
    top = tokens.agreement
    return TokenStatistics(
        perplexity_quantized=ppl,
        perplexity_baseline=ppl_before,
        ln_perplexity_correlation=_correlation(covariance, before.error, after.error, count),
        ln_perplexity_ratio=ratio,
        perplexity_ratio=_exp(ratio),
        perplexity_difference=_difference(ppl, ppl_before, covariance),
        kl=distribution(tokens.kl),
        delta_p=distribution(delta_p),
        # The error of a root: half the square's, over the root.
        delta_p_rms=Estimate(rms, None if square.error is None else square.error / (2 * rms) if rms else 0.0),
        same_top=Estimate(top, math.sqrt(top * (1 - top) / (count - 1)) if count > 1 else None),
    )


def distribution(values: torch.Tensor) -> Distribution:
    """Returns how `values` (tokens,) are spread: mean, ends, percentiles."""
    ordered = values.double().sort().values
    at = {name: percentile(ordered, share) for name, share in PERCENTILES.items()}
    return Distribution(mean=_mean(values), max=float(ordered[-1]), min=float(ordered[0]), **at)


def percentile(ordered: torch.Tensor, share: float) -> float:
    """Returns the percentile `share` (0 to 100) of sorted values (n,), interpolated linearly between two neighbours.

    Of any number of values, where `torch.quantile` takes 16 million at most.
    """
    place = share / 100 * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    below, above = float(ordered[low]), float(ordered[high])
    return below + (place - low) * (above - below) if below != above else below


def _mean(values: torch.Tensor) -> Estimate:
    error = float(values.double().std()) / math.sqrt(values.numel()) if values.numel() > 1 else None
    return Estimate(float(values.double().mean()), error)


def _exp(mean: Estimate) -> Estimate:
    """Returns exp of a mean, its error to first order."""
    value = math.exp(mean.value) if mean.value < 700 else math.inf if mean.value >= 700 else math.nan
    return Estimate(value, None if mean.error is None else value * mean.error)


def _correlation(covariance: float, before: float | None, after: float | None, count: int) -> Estimate:
    if before is None or after is None or not before * after:
        return Estimate(math.nan, None)
    r = covariance / (before * after)
    return Estimate(r, max(0.0, 1 - r * r) / math.sqrt(count - 1))


def _difference(after: Estimate, before: Estimate, covariance: float) -> Estimate:
    """Returns the difference of two perplexities; `covariance` is that of the two means of losses."""
    value = after.value - before.value
    if after.error is None or before.error is None:
        return Estimate(value, None)
    variance = after.error**2 + before.error**2 - 2 * after.value * before.value * covariance
    return Estimate(value, 0.0 if variance <= 0 else math.sqrt(variance))
