"""Perplexity, KL and agreement against plain formulas."""

import math

import numpy as np
import torch

from ptq.evaluation.comparison import compare, perplexity
from ptq.evaluation.token_comparison import compare_tokens, window_losses


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


@torch.no_grad()
def test_the_figures_of_a_comparison_are_those_of_numpy_over_windows_and_tokens():
    head, hidden, ids = _case(windows=9, length=41)
    other = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))
    found = compare(
        window_losses(head, hidden, ids, 6), compare_tokens((head, head), hidden, other, ids, 6), 41, 500, 0.95, 0
    )
    p, q = (head(h)[:, :-1].double().log_softmax(-1).numpy() for h in (hidden, other))
    before, after = (np.exp(-np.take_along_axis(x, ids[:, 1:, None].numpy(), 2).mean()) for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1)
    expected = [before, after, after / before, after - before, kl.mean(), np.percentile(kl, 99)]
    figures = [
        found.baseline_perplexity,
        found.quantized_perplexity,
        found.ratio,
        found.difference,
        found.kl_mean,
        found.kl_p99,
    ]
    np.testing.assert_allclose(figures, expected, rtol=1e-4)
    assert (found.windows, found.tokens) == (9, 360)


def test_perplexity_of_an_exploded_model_is_infinite_not_an_error():
    assert perplexity(torch.tensor([1e6], dtype=torch.float64)) == math.inf
