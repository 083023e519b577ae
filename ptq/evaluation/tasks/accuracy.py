"""Two models right or wrong on the same samples: accuracies, their difference, whether it is more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import scipy


@dataclass(frozen=True)
class TaskResult:
    """Baseline against quantized model on a task.

    Attributes:
        task: its name.
        metric: what makes a sample right: lm-eval's name for it, such as ``acc``.
        samples: how many both have answered.
        baseline: the baseline's share of right answers.
        quantized: the quantized model's.
        difference: quantized less baseline.
        low: lower end of the difference's interval, given how many samples the two differ on; at the evaluation's confidence.
        high: its upper end.
        lost: samples that only the baseline has right.
        won: samples that only the quantized model has right.
        p: McNemar's exact p: of the null that a sample on which they differ is as often lost as won.
        bos: what begins each prompt: a special token, or nothing.
    """

    task: str
    metric: str
    samples: int
    baseline: float
    quantized: float
    difference: float
    low: float
    high: float
    lost: int
    won: int
    p: float
    bos: str


def accuracy_difference(
    task: str, metric: str, baseline: Sequence[bool], quantized: Sequence[bool], confidence: float, bos: str = ""
) -> TaskResult:
    """Compares two models, sample by sample.

    The test is the binomial one of the samples on which they differ (McNemar 1947, exact). The interval is Clopper and Pearson's of
    the share won among those, scaled to a difference of accuracies: it holds 0 exactly where p is above 1 - `confidence`.

    Args:
        task: its name.
        metric: of its samples.
        baseline: whether the baseline has each sample right.
        quantized: whether the quantized model has, of the same samples in the same order.
        confidence: coverage of the interval, 0 to 1.
        bos: what begins each prompt.

    Raises:
        ValueError: for unequal numbers of samples, or none.
    """
    if len(baseline) != len(quantized) or not baseline:
        raise ValueError(f"{len(baseline)} and {len(quantized)} samples: expected as many of each, at least one")
    n = len(baseline)
    lost = sum(a and not b for a, b in zip(baseline, quantized, strict=True))
    won = sum(b and not a for a, b in zip(baseline, quantized, strict=True))
    before, after = sum(map(bool, baseline)) / n, sum(map(bool, quantized)) / n
    if lost + won == 0:
        return TaskResult(task, metric, n, before, after, 0.0, 0.0, 0.0, 0, 0, 1.0, bos)
    test = scipy.stats.binomtest(won, won + lost, 0.5)
    ends = test.proportion_ci(confidence, "exact")
    scale = (won + lost) / n
    low, high = ((2 * float(end) - 1) * scale for end in (ends.low, ends.high))
    return TaskResult(task, metric, n, before, after, (won - lost) / n, low, high, lost, won, float(test.pvalue), bos)
