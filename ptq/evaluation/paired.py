"""Two models on the same windows: the difference of their log perplexities, whether it is more than chance, what could be seen."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy
import torch

from ptq.evaluation.interval import FEWEST

POWER = 0.8
"""How often a difference as great as the least detectable one is found."""
EXACT_CLUSTERS = 14
"""Up to so many clusters all 2^n assignments of signs are looked at."""


@dataclass(frozen=True)
class Paired:
    """The difference of log perplexity, second model less first, in nats a token.

    Attributes:
        difference: mean over windows of the difference of their mean losses.
        low: lower end of its interval; None for a single cluster.
        high: upper end.
        p: of the null that the sign of a cluster's difference is a coin's; two-sided; 1 for a single cluster.
        detectable: the least difference that such windows show at this confidence four times out of five; None for one cluster.
        windows: how many.
        clusters: documents, or windows where these are not known.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    detectable: float | None
    windows: int
    clusters: int


def paired(
    first: Sequence[float],
    second: Sequence[float],
    documents: Sequence[int] | None = None,
    confidence: float = 0.95,
    draws: int = 10000,
    seed: int = 0,
) -> Paired:
    """Compares two models on the same windows.

    Windows of one document are not independent: they are drawn, and their signs flipped, together.

    Args:
        first: mean loss of every window, in nats a target.
        second: the other model's, of the same windows in the same order.
        documents: the document of every window, or None where each counts by itself.
        confidence: coverage of the interval, 0 to 1.
        draws: resamples of the bootstrap, and assignments of signs where there are too many to look at all.
        seed: of the draws.

    Raises:
        ValueError: for unequal numbers of windows, or none.
    """
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    if len(a) != len(b) or not len(a) or (documents is not None and len(documents) != len(a)):
        raise ValueError(f"{len(a)} and {len(b)} windows: expected as many of each, at least one")
    sums, sizes = _clusters(b - a, documents)
    mean, clusters = float((b - a).mean()), len(sums)
    if clusters == 1:
        return Paired(mean, None, None, 1.0, None, len(a), 1)
    generator = torch.Generator().manual_seed(seed)
    residual = sums - mean * sizes
    error = math.sqrt(clusters / (clusters - 1) * float((residual**2).sum())) / float(sizes.sum())
    t = scipy.stats.t(clusters - 1)  # scipy imports its statistics, half a second, when they are asked for
    tail = (1 - confidence) / 2
    if clusters < FEWEST:
        half = float(t.ppf(1 - tail)) * error
        low, high = mean - half, mean + half
    else:
        picked = torch.randint(clusters, (draws, clusters), generator=generator)
        means = sums[picked].sum(1) / sizes[picked].sum(1)
        low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    detectable = (float(t.ppf(1 - tail)) + float(t.ppf(POWER))) * error
    return Paired(mean, low, high, sign_flip(sums, draws, generator), detectable, len(a), clusters)


def sign_flip(sums: torch.Tensor, draws: int, generator: torch.Generator) -> float:
    """Returns the two-sided p of the sum of `sums` (clusters,) under random signs: exact for few clusters, else by `draws`.

    Drawn assignments count the observed one in, so that p is never 0 (Phipson and Smyth 2010).
    """
    observed = float(sums.sum().abs())
    slack = 1e-12 * float(sums.abs().sum())  # equal sums in another order are equal
    if len(sums) <= EXACT_CLUSTERS:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(sums))), dtype=torch.float64)
        return float(((signs @ sums).abs() >= observed - slack).double().mean())
    signs = torch.randint(2, (draws, len(sums)), generator=generator).double() * 2 - 1
    return (1 + int(((signs @ sums).abs() >= observed - slack).sum())) / (1 + draws)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number (Holm 1979): deciding by them errs once among all with the level's chance."""
    order = sorted(range(len(values)), key=values.__getitem__)
    done = [0.0] * len(values)
    greatest = 0.0
    for rank, index in enumerate(order):
        greatest = max(greatest, min(1.0, (len(values) - rank) * values[index]))
        done[index] = greatest
    return done


def _clusters(values: torch.Tensor, documents: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sum of `values` (windows,) over each document and its number of windows, both float64 (clusters,)."""
    if documents is None:
        return values, torch.ones_like(values)
    _, places = torch.unique(torch.tensor(documents), return_inverse=True)
    count = int(places.max()) + 1
    zeros = torch.zeros(count, dtype=torch.float64)
    return zeros.scatter_add(0, places, values), zeros.scatter_add(0, places, torch.ones_like(values))
