"""Baseline against quantized model by the protocol of METHODS.md section 8: the figures of a result."""

import math
from dataclasses import dataclass

import torch

from ptq.evaluation.interval import interval_of
from ptq.evaluation.token_comparison import TokenComparison
from ptq.evaluation.token_statistics import TokenStatistics, token_statistics


@dataclass(frozen=True)
class Comparison:
    """Baseline against quantized model on the same windows.

    Attributes:
        baseline_perplexity: of the unquantized model: exp of the mean over windows of the mean loss a target.
        quantized_perplexity: of the quantized model.
        ratio: quantized perplexity over the baseline's.
        difference: quantized perplexity less the baseline's.
        difference_low: lower end of the difference's interval; null where one window allows none.
        difference_high: upper end of the difference's interval; null where one window allows none.
        interval: how the interval was found: ``bootstrap`` over windows (8 or more), ``t`` (Student's, of 2 to 7 windows: wide,
            as they know little), ``none`` (one window).
        confidence: how often such an interval holds the true difference, 0 to 1.
        kl_mean: mean KL(baseline || quantized) of the next-token distributions, nats a token.
        kl_p99: its 99th percentile over tokens, nats.
        top1_agreement: share of tokens at which both models find the same token the most likely.
        windows: number of windows.
        tokens: number of targets, all windows together.
        token_statistics: the columns of llama.cpp's perplexity tool.
    """

    baseline_perplexity: float
    quantized_perplexity: float
    ratio: float
    difference: float
    difference_low: float | None
    difference_high: float | None
    interval: str
    confidence: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    windows: int
    tokens: int
    token_statistics: TokenStatistics


def perplexity(losses: torch.Tensor) -> float:
    """Returns exp of the mean of per-window losses; inf where that overflows."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf


def compare(
    baseline: torch.Tensor, tokens: TokenComparison, length: int, resamples: int, confidence: float, seed: int
) -> Comparison:
    """Puts per-window losses of the baseline and a `TokenComparison` together into the figures of a result.

    Args:
        baseline: the baseline's mean loss of every window, nats a target, float64 (windows,).
        tokens: both models on the same windows.
        length: tokens of a window.
        resamples: number of bootstrap draws.
        confidence: coverage of the interval, 0 to 1.
        seed: seeds the draws.
    """
    interval = interval_of(baseline, tokens.losses, resamples, confidence, seed)
    before, after = perplexity(baseline), perplexity(tokens.losses)
    statistics = token_statistics(tokens)
    return Comparison(
        baseline_perplexity=before,
        quantized_perplexity=after,
        ratio=after / before,
        difference=after - before,
        difference_low=interval.low,
        difference_high=interval.high,
        interval=interval.kind,
        confidence=confidence,
        kl_mean=float(tokens.kl.mean()),
        kl_p99=statistics.kl.p99,
        top1_agreement=tokens.agreement,
        windows=len(baseline),
        tokens=len(baseline) * (length - 1),
        token_statistics=statistics,
    )
