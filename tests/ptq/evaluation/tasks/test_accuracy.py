"""McNemar's test and its interval against their definitions; what no comparison can be made of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.evaluation.tasks.accuracy import accuracy_difference

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def exact_p(lost, won):
    """Two-sided binomial p: the chance of a split at least as uneven."""
    n = lost + won
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n) if n else 1.0


@given(answers)
def test_accuracies_counts_and_p_are_those_of_the_samples(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    found = accuracy_difference("t", "acc", before, after, 0.95)
    assert found.baseline == pytest.approx(sum(before) / len(pairs))
    assert found.difference == pytest.approx(found.quantized - found.baseline)
    assert (found.lost, found.won) == (sum(a > b for a, b in pairs), sum(b > a for a, b in pairs))
    assert found.p == pytest.approx(exact_p(found.lost, found.won))
    assert found.low <= found.difference <= found.high


@given(answers, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_interval_holds_zero_exactly_where_p_says_chance(pairs, confidence):
    found = accuracy_difference("t", "acc", [a for a, _ in pairs], [b for _, b in pairs], confidence)
    if abs(found.p - (1 - confidence)) > 1e-9:
        assert (found.low <= 0 <= found.high) == (found.p > 1 - confidence)


def test_ten_lost_of_ten_is_told_by_hand():
    found = accuracy_difference("t", "acc", [True] * 100, [False] * 10 + [True] * 90, 0.95)
    assert found.p == pytest.approx(2 / 2**10)
    # Clopper and Pearson of 0 in 10: from 0 to 1 - (0.025)^(1/10).
    assert (found.low, found.high) == pytest.approx((-0.1, (2 * (1 - 0.025**0.1) - 1) * 0.1))


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_unequal_numbers_of_samples_are_refused(before, after):
    with pytest.raises(ValueError, match="samples: expected as many of each"):
        accuracy_difference("t", "acc", before, after, 0.95)
