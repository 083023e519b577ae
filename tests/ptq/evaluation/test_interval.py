"""Intervals over windows: they cover what they promise, and few windows know little."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.evaluation.comparison import perplexity
from ptq.evaluation.interval import FEWEST, bootstrap_interval, interval_of, t_interval

losses = st.lists(st.floats(0, 12), min_size=1, max_size=30)


@given(losses, st.integers(0, 2**31))
def test_the_interval_of_a_model_against_itself_contains_zero(values, seed):
    x = torch.tensor(values, dtype=torch.float64)
    found = interval_of(x, x, 200, 0.95, seed)
    assert found.kind == "none" if len(x) == 1 else found.low <= 0 <= found.high


@given(losses, st.floats(0.01, 2))
def test_a_loss_raised_in_every_window_gives_an_interval_above_zero(values, shift):
    x = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(x, x + shift, 200, 0.95, 0)
    assert 0 < low <= perplexity(x + shift) * 40 and low <= high


@pytest.mark.parametrize(
    ("windows", "low", "high"), [(40, 0.85, 0.995), (2, 0.90, 0.99), (4, 0.90, 0.99), (7, 0.90, 0.99)]
)
def test_the_interval_covers_the_truth_about_as_often_as_it_promises(windows, low, high):
    g = torch.Generator().manual_seed(0)
    covered = 0
    for i in range(400):
        base = 3 + 0.3 * torch.randn(windows, generator=g, dtype=torch.float64)
        noise = 0.05 * torch.randn(windows, generator=g, dtype=torch.float64)
        found = interval_of(base, base + 0.02 + noise, 400, 0.95, i)
        # Below FEWEST windows the baseline is taken as it is, so the truth is that of its own windows.
        before = 3.045 if windows >= FEWEST else float(base.mean())
        extra = 0.05**2 / 2 if windows >= FEWEST else 0.0
        covered += found.low <= math.exp(before + 0.02 + extra) - math.exp(before) <= found.high
    assert low <= covered / 400 <= high


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_the_bootstrap_is_scipys_paired_one_to_the_noise_of_its_draws(confidence):
    g = np.random.default_rng(0)
    x = 3 + 0.3 * g.standard_normal(60)
    y = x + 0.05 + 0.1 * g.standard_normal(60)
    expected = scipy.stats.bootstrap(
        (x, y), lambda a, b, axis: np.exp(b.mean(axis)) - np.exp(a.mean(axis)), paired=True, n_resamples=20000,
        confidence_level=confidence, method="percentile", rng=g,
    ).confidence_interval  # fmt: skip
    found = bootstrap_interval(torch.from_numpy(x), torch.from_numpy(y), 20000, confidence, 0)
    assert found == pytest.approx(tuple(expected), abs=0.03 * (expected.high - expected.low))


def test_the_same_seed_gives_the_same_interval():
    x = torch.linspace(2, 4, 16, dtype=torch.float64)
    y = x + torch.linspace(-0.1, 0.3, 16, dtype=torch.float64)
    assert bootstrap_interval(x, y, 300, 0.9, 3) == bootstrap_interval(x, y, 300, 0.9, 3)


@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=7), st.sampled_from([0.8, 0.95, 0.99]))
def test_few_windows_have_the_interval_of_students_t(shifts, confidence):
    x = torch.linspace(2, 3, len(shifts), dtype=torch.float64)
    d = torch.tensor(shifts, dtype=torch.float64)
    found = interval_of(x, x + d, 200, confidence, 0)
    assert found.kind == "t"
    values = np.array((x + d) - x)
    error = values.std(ddof=1) / math.sqrt(len(values))
    reach = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error
    ends = [math.exp(2.5) * math.expm1(values.mean() + side * reach) for side in (-1, 1)]
    assert [found.low, found.high] == pytest.approx(ends, rel=1e-6, abs=1e-9)


def test_fewer_windows_of_the_same_spread_know_less():
    def width(windows):
        x = torch.full((windows,), 3.0, dtype=torch.float64)
        low, high = t_interval(x, x + 0.1 + 0.05 * torch.linspace(-1, 1, windows, dtype=torch.float64), 0.95)
        return high - low

    widths = [width(n) for n in (2, 3, 4, 6)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 10 * widths[-1]


def test_one_window_has_no_interval():
    one = torch.tensor([3.0], dtype=torch.float64)
    found = interval_of(one, one + 1, 100, 0.95, 0)
    assert (found.low, found.high, found.kind) == (None, None, "none")
