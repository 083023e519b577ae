"""How sure the difference of two perplexities is: intervals over windows that both models have seen."""

import math
from dataclasses import dataclass

import torch

FEWEST = 8
"""Windows from which on a bootstrap over windows says something: fewer have too few different resamples."""


@dataclass(frozen=True)
class Interval:
    """An interval of perplexity(quantized) - perplexity(baseline).

    Attributes:
        low: its lower end; null where there is none.
        high: its upper end; null where there is none.
        kind: ``bootstrap``, ``t``, or ``none``.
    """

    low: float | None
    high: float | None
    kind: str


def interval_of(
    baseline: torch.Tensor, quantized: torch.Tensor, resamples: int, confidence: float, seed: int
) -> Interval:
    """Returns the interval that so many windows allow: none of one window, Student's t below `FEWEST`, else a bootstrap.

    Args:
        baseline: per-window losses in nats a target, float64 (windows,).
        quantized: the same windows' losses of the other model.
        resamples: number of bootstrap draws.
        confidence: coverage of the interval, 0 to 1.
        seed: seeds the draws.
    """
    if len(baseline) < 2:
        return Interval(None, None, "none")
    if len(baseline) < FEWEST:
        return Interval(*t_interval(baseline, quantized, confidence), "t")
    return Interval(*bootstrap_interval(baseline, quantized, resamples, confidence, seed), "bootstrap")


def bootstrap_interval(
    baseline: torch.Tensor, quantized: torch.Tensor, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Returns the percentile-bootstrap interval of perplexity(quantized) - perplexity(baseline).

    Windows are drawn with replacement, the same ones for both models, so what windows share cancels. Arguments: see
    `interval_of`.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(baseline), (resamples, len(baseline)), generator=generator)
    difference = quantized[draws].mean(1).exp() - baseline[draws].mean(1).exp()
    tail = (1 - confidence) / 2
    low, high = torch.quantile(difference, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def t_interval(baseline: torch.Tensor, quantized: torch.Tensor, confidence: float) -> tuple[float, float]:
    """Returns Student's interval of the mean difference of paired losses, as a difference of perplexities.

    With two windows and 95% it is 12.7 standard errors wide to each side: as little as two windows know. The baseline's
    perplexity is taken as it is, so the interval's ends are baseline x (exp(d) - 1) of the ends d in nats.
    """
    from scipy.special import stdtrit  # a fifth of a second, which runs of more windows need not wait for

    difference = quantized - baseline
    error = float(difference.std()) / math.sqrt(len(difference))
    reach = float(stdtrit(len(difference) - 1, (1 + confidence) / 2)) * error
    ends = difference.mean() + torch.tensor([-reach, reach], dtype=torch.float64)
    low, high = (baseline.mean().exp() * ends.expm1()).tolist()
    return low, high
