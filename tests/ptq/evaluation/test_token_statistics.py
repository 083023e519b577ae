"""llama.cpp's columns against numpy on full logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.evaluation.token_comparison import TokenComparison, compare_tokens
from ptq.evaluation.token_statistics import percentile, token_statistics

SHARES = {"p99_9": 99.9, "p99": 99, "p95": 95, "p90": 90, "median": 50, "p10": 10, "p5": 5, "p1": 1, "p0_1": 0.1}


def case(seed, windows, length, channels=8, vocabulary=23, noise=0.4):
    """Heads, hidden states of two models, and ids."""
    g = torch.Generator().manual_seed(seed)
    heads = [torch.nn.Linear(channels, vocabulary, dtype=torch.float64).requires_grad_(False) for _ in range(2)]
    bias = torch.randn(vocabulary, generator=g, dtype=torch.float64) / math.sqrt(channels)
    for head in heads:
        head.bias.copy_(bias)
    weight = torch.randn(vocabulary, channels, generator=g, dtype=torch.float64)
    heads[0].weight.copy_(weight)
    heads[1].weight.copy_(weight + 0.1 * torch.randn(vocabulary, channels, generator=g))
    hidden = torch.randn(windows, length, channels, generator=g, dtype=torch.float64)
    other = hidden + noise * torch.randn(hidden.shape, generator=g)
    return heads, hidden, other, torch.randint(vocabulary, (windows, length), generator=g)


def log_probabilities(head, hidden):
    """Of every target's place, numpy (tokens, vocabulary)."""
    logits = head(hidden)[:, :-1].flatten(0, 1).numpy()
    return (
        logits
        - logits.max(1, keepdims=True)
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    )


def near(found, expected):
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-6)


def check_distribution(found, values):
    near(found.mean.value, values.mean())
    near(found.mean.error, values.std(ddof=1) / math.sqrt(len(values)))
    near([found.max, found.min], [values.max(), values.min()])
    for name, share in SHARES.items():
        near(getattr(found, name), np.percentile(values, share))


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(3, 40), st.integers(1, 50))
def test_every_column_equals_numpy_on_full_logits(seed, windows, length, chunk):
    heads, hidden, other, ids = case(seed, windows, length)
    found = token_statistics(compare_tokens(tuple(heads), hidden, other, ids, chunk))
    p, q = log_probabilities(heads[0], hidden), log_probabilities(heads[1], other)
    targets = ids[:, 1:].flatten().numpy()
    a, b = (-x[np.arange(len(targets)), targets] for x in (p, q))
    n = len(targets)
    means = np.cov(np.stack([a, b])) / n
    ppl, ppl_before = math.exp(b.mean()), math.exp(a.mean())
    near([found.perplexity_quantized.value, found.perplexity_baseline.value], [ppl, ppl_before])
    near(found.perplexity_quantized.error, ppl * math.sqrt(means[1, 1]))
    near(found.perplexity_baseline.error, ppl_before * math.sqrt(means[0, 0]))
    r = np.corrcoef(a, b)[0, 1]
    near(
        [found.ln_perplexity_correlation.value, found.ln_perplexity_correlation.error],
        [r, (1 - r * r) / math.sqrt(n - 1)],
    )
    ratio_error = math.sqrt(means[0, 0] + means[1, 1] - 2 * means[0, 1])
    near([found.ln_perplexity_ratio.value, found.ln_perplexity_ratio.error], [b.mean() - a.mean(), ratio_error])
    near(
        [found.perplexity_ratio.value, found.perplexity_ratio.error], [ppl / ppl_before, ppl / ppl_before * ratio_error]
    )
    gradient = np.array([-ppl_before, ppl])
    # Losses are of float32 logits: the difference of two perplexities is as exact as these are, not as it is itself.
    assert found.perplexity_difference.value == pytest.approx(ppl - ppl_before, rel=2e-4, abs=2e-6 * max(1, ppl))
    near(found.perplexity_difference.error, math.sqrt(gradient @ means @ gradient))
    check_distribution(found.kl, (np.exp(p) * (p - q)).sum(1))
    delta = np.exp(-b) - np.exp(-a)
    check_distribution(found.delta_p, delta)
    rms = math.sqrt((delta**2).mean())
    near([found.delta_p_rms.value, found.delta_p_rms.error], [rms, (delta**2).std(ddof=1) / math.sqrt(n) / 2 / rms])
    same = (p.argmax(1) == q.argmax(1)).mean()
    near([found.same_top.value, found.same_top.error], [same, math.sqrt(same * (1 - same) / (n - 1))])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.floats(0, 100))
def test_a_percentile_is_that_of_numpy(values, share):
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    assert percentile(ordered, share) == pytest.approx(float(np.percentile(values, share)), rel=1e-9, abs=1e-9)


def test_a_model_against_itself_differs_in_nothing():
    heads, hidden, _, ids = case(0, 2, 9)
    found = token_statistics(compare_tokens((heads[0], heads[0]), hidden, hidden, ids, 4))
    assert found.kl.max == 0 == found.delta_p.max == found.delta_p.min == found.delta_p_rms.value
    assert found.ln_perplexity_correlation.value == pytest.approx(1)
    assert (found.same_top.value, found.same_top.error) == (1, 0)
    assert (found.perplexity_ratio.value, found.perplexity_ratio.error) == (1, 0)


def test_one_token_has_no_error_and_an_exploded_loss_is_no_exception():
    one = torch.ones(1, dtype=torch.float64)
    lone = token_statistics(TokenComparison(one, one, one, one, torch.tensor([True])))
    assert (
        lone.kl.mean.error is None and lone.same_top.error is None and math.isnan(lone.ln_perplexity_correlation.value)
    )
    huge = torch.tensor([1e6, 2e6], dtype=torch.float64)
    found = token_statistics(TokenComparison(huge[:1], huge, huge, huge, torch.tensor([True, False])))
    assert found.perplexity_quantized.value == math.inf and math.isnan(found.perplexity_difference.value)
