"""The paired test of two models: against SciPy's own tests, by simulation, and clusters that count as one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ptq.evaluation.paired import holm, paired

losses = st.lists(st.floats(1, 5), min_size=2, max_size=10)


def pair(count, shift=0.0, seed=0, spread=0.01):
    random = np.random.default_rng(seed)
    first = random.normal(2, 0.5, count)
    return first.tolist(), (first + random.normal(shift, spread, count)).tolist()


def test_p_is_that_of_the_permutation_test_of_scipy():
    first, second = pair(10, 0.005)
    ours = paired(first, second).p

    def statistic(x, y, axis):
        return np.mean(y - x, axis=axis)

    theirs = stats.permutation_test(
        (np.array(first), np.array(second)), statistic, permutation_type="samples", n_resamples=math.inf
    )
    assert ours == pytest.approx(theirs.pvalue, abs=1e-12)


def test_many_windows_are_drawn_and_agree_with_the_t_test():
    first, second = pair(200, 0.0015, seed=3)
    found = paired(first, second)
    assert found.p == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=0.25)
    interval = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found.low == pytest.approx(interval.low, abs=1e-4) and found.high == pytest.approx(interval.high, abs=1e-4)


def test_few_windows_have_students_interval():
    first, second = pair(5, 0.01)
    interval = stats.ttest_rel(second, first).confidence_interval(0.9)
    found = paired(first, second, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_the_least_detectable_difference_is_found_four_times_out_of_five():
    detectable = np.mean([paired(*pair(20, seed=s), draws=100).detectable for s in range(30)])
    found = [paired(*pair(20, detectable, seed=1000 + s), draws=500).p < 0.05 for s in range(200)]
    assert 0.7 < np.mean(found) < 0.9


def test_without_a_difference_one_in_twenty_is_found():
    found = [paired(*pair(20, seed=s), draws=500).p < 0.05 for s in range(400)]
    assert np.mean(found) < 0.085


@settings(max_examples=30)
@given(losses, st.integers(0, 1000))
def test_windows_of_one_document_repeated_say_no_more_than_one_window(values, seed):
    first = values
    second = (np.array(values) + np.random.default_rng(seed).normal(0, 0.1, len(values))).tolist()
    once = paired(first, second, draws=50)
    copies = [x for x in first for _ in range(3)], [x for x in second for _ in range(3)]
    together = paired(*copies, documents=[i for i in range(len(first)) for _ in range(3)], draws=50)
    assert together.clusters == once.clusters and together.windows == 3 * once.windows
    assert together.p == once.p
    assert together.detectable == pytest.approx(once.detectable)
    assert (together.low, together.high) == pytest.approx((once.low, once.high))


@settings(max_examples=20)
@given(losses)
def test_equal_models_differ_by_nothing(values):
    found = paired(values, values, draws=50)
    assert (found.difference, found.low, found.high, found.p, found.detectable) == (0, 0, 0, 1, 0)


def test_one_window_or_one_document_tells_nothing():
    assert paired([2.0], [1.0]).p == 1 and paired([2.0], [1.0]).low is None
    assert paired([2.0, 3.0], [1.0, 1.0], documents=[7, 7]).clusters == 1


def test_unequal_windows_are_refused():
    with pytest.raises(ValueError, match="2 and 1 windows"):
        paired([1.0, 2.0], [1.0])


def test_holm_is_what_the_definition_says():
    values = [0.01, 0.04, 0.03, 0.005]
    level = {}
    for alpha in np.linspace(0, 1, 10001):
        rejected = set()
        for rank, index in enumerate(sorted(range(4), key=lambda i: values[i])):
            if values[index] > alpha / (4 - rank):
                break
            rejected.add(index)
        for index in rejected:
            level.setdefault(index, alpha)
    assert holm(values) == pytest.approx([level[i] for i in range(4)], abs=2e-4)
    assert all(a <= b for a, b in itertools.pairwise(sorted(holm([0.5, 0.9, 0.2]))))
    assert holm([]) == []
