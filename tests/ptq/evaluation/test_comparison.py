"""Perplexity, the paired interval, KL and agreement against plain formulas."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.evaluation.comparison import (
    TokenComparison,
    bootstrap_interval,
    compare,
    compare_tokens,
    perplexity,
    window_losses,
)


def _case(seed=0, windows=3, length=17, channels=8, vocabulary=23):
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(channels, vocabulary)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, channels, generator=g))
    hidden = torch.randn(windows, length, channels, generator=g)
    return head, hidden, torch.randint(vocabulary, (windows, length), generator=g)


@torch.no_grad()
def test_window_losses_equal_the_cross_entropy_of_the_whole_window_for_any_chunk():
    head, hidden, ids = _case()
    logits = head(hidden)[:, :-1].flatten(0, 1)
    whole = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(3, -1).mean(1)
    for chunk in (1, 5, 16, 100):
        torch.testing.assert_close(window_losses(head, hidden, ids, chunk).float(), whole)


@torch.no_grad()
def test_kl_and_agreement_match_torch_on_full_logits():
    head, hidden, ids = _case()
    other = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))
    result = compare_tokens((head, head), hidden, other, ids, chunk=5)
    p, q = (head(h)[:, :-1].double().log_softmax(-1) for h in (hidden, other))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).flatten()
    torch.testing.assert_close(result.kl, expected, rtol=1e-4, atol=1e-6)
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    torch.testing.assert_close(result.losses, window_losses(head, other, ids, 7), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_model_compared_with_itself_shows_no_difference():
    head, hidden, ids = _case()
    result = compare_tokens((head, head), hidden, hidden, ids, chunk=6)
    comparison = compare(window_losses(head, hidden, ids, 6), result, 17, 500, 0.95, 0)
    assert comparison.kl_mean == 0 and comparison.top1_agreement == 1
    assert comparison.difference_low <= 0 <= comparison.difference_high
    assert abs(comparison.ratio - 1) < 1e-6


losses = st.lists(st.floats(0, 12), min_size=1, max_size=30)


@given(losses, st.integers(0, 2**31))
def test_the_interval_of_a_model_against_itself_contains_zero(values, seed):
    x = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(x, x, 200, 0.95, seed)
    assert low <= 0 <= high


@given(losses, st.floats(0.01, 2))
def test_a_loss_raised_in_every_window_gives_an_interval_above_zero(values, shift):
    x = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(x, x + shift, 200, 0.95, 0)
    assert 0 < low <= perplexity(x + shift) * 40 and low <= high


def test_the_interval_covers_the_truth_about_as_often_as_it_promises():
    g = torch.Generator().manual_seed(0)
    covered = 0
    for i in range(200):
        base = 3 + 0.3 * torch.randn(40, generator=g, dtype=torch.float64)
        noise = 0.05 * torch.randn(40, generator=g, dtype=torch.float64)
        low, high = bootstrap_interval(base, base + 0.02 + noise, 400, 0.95, i)
        truth = math.exp(3.045 + 0.02 + 0.05**2 / 2) - math.exp(3.045)
        covered += low <= truth <= high
    assert 0.85 <= covered / 200 <= 0.995


def test_the_same_seed_gives_the_same_interval():
    x = torch.linspace(2, 4, 16, dtype=torch.float64)
    y = x + torch.linspace(-0.1, 0.3, 16, dtype=torch.float64)
    assert bootstrap_interval(x, y, 300, 0.9, 3) == bootstrap_interval(x, y, 300, 0.9, 3)


def test_perplexity_of_an_exploded_model_is_infinite_not_an_error():
    assert perplexity(torch.tensor([1e6], dtype=torch.float64)) == math.inf
    assert isinstance(TokenComparison(torch.ones(1), torch.ones(1), 1.0).agreement, float)
