"""Allocation under a budget: every choice tried, and an integer programme solved by HiGHS, find no better one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from ptq.allocation import knapsack
from ptq.allocation.knapsack import allocate

CHOICE = st.tuples(st.integers(0, 40), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3)))


def sums(problem, chosen):
    """Size and loss of a choice."""
    picked = [group[i] for group, i in zip(problem, chosen, strict=True)]
    return sum(size for size, _ in picked), sum(loss for _, loss in picked)


def solved(problem, budget):
    """What `allocate` chooses of groups of (size, loss)."""
    return allocate([[s for s, _ in g] for g in problem], [[x for _, x in g] for g in problem], budget)


@given(
    st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 200), st.integers(1, 7)
)
def test_no_choice_within_the_budget_is_better_and_of_equals_none_is_smaller(problem, extra, scale):
    problem = [[(size * scale, loss) for size, loss in group] for group in problem]
    budget = sum(min(size for size, _ in group) for group in problem) + extra
    every = [sums(problem, chosen) for chosen in itertools.product(*(range(len(group)) for group in problem))]
    size, loss = sums(problem, solved(problem, budget))
    least = min(x for s, x in every if s <= budget)
    assert size <= budget and loss == pytest.approx(least, abs=1e-9)
    assert size <= max(s for s, x in every if s <= budget and x <= least + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_an_integer_programme_finds_the_same_least_loss(seed):
    random = np.random.default_rng(seed)
    groups, choices = 60, 6
    sizes = np.sort(random.integers(1, 2000, (groups, choices)), axis=1) * 72
    losses = np.sort(random.lognormal(0, 2, (groups, choices)), axis=1)[:, ::-1]
    budget = int(sizes.min(1).sum() + 0.4 * (sizes.max(1).sum() - sizes.min(1).sum()))
    one_each = np.kron(np.eye(groups), np.ones(choices))
    best = milp(
        losses.ravel(), integrality=np.ones(losses.size), bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.ravel()[None], 0, budget)],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    chosen = allocate(sizes.tolist(), losses.tolist(), budget)
    rows = np.arange(groups)
    assert sizes[rows, chosen].sum() <= budget
    assert losses[rows, chosen].sum() == pytest.approx(best.fun, rel=1e-6)


def test_a_fine_budget_is_kept_and_costs_little_where_sizes_are_rounded(monkeypatch):
    random = np.random.default_rng(3)
    sizes = np.sort(random.integers(10**6, 10**7, (40, 5)), axis=1)
    losses = np.sort(random.lognormal(0, 1, (40, 5)), axis=1)[:, ::-1]
    budget = int(sizes.mean(1).sum())
    rows = np.arange(40)
    fine = allocate(sizes.tolist(), losses.tolist(), budget)
    monkeypatch.setattr(knapsack, "MOST_UNITS", 2000)
    coarse = allocate(sizes.tolist(), losses.tolist(), budget)
    assert sizes[rows, fine].sum() <= budget and sizes[rows, coarse].sum() <= budget
    assert losses[rows, fine].sum() <= losses[rows, coarse].sum() <= 1.05 * losses[rows, fine].sum()


@pytest.mark.parametrize(
    ("sizes", "losses", "budget", "line"),
    [
        ([[3, 4]], [[1.0, 0.0]], 2, "below 3"),
        ([[3, 4]], [[1.0]], 9, "as many of each"),
        ([[]], [[]], 9, "at least one"),
        ([[1]], [[float("nan")]], 9, "NaN or inf"),
    ],
)
def test_problems_without_an_answer_are_refused(sizes, losses, budget, line):
    with pytest.raises(ValueError, match=line):
        allocate(sizes, losses, budget)
