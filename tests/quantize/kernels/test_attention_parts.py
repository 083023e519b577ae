import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.kernels.attention_parts import LONGEST, PART, attention_in_parts, wins_in_parts


def heads_of(count, tokens, channels, seed):
    made = torch.randn(2, tokens, count, channels, generator=torch.Generator().manual_seed(seed))
    return made.transpose(1, 2)  # as a model has them: a head's tokens do not lie beside one another


def by_numpy(query, key, value, scale):
    q, k, v = (t.double().numpy() for t in (query, key, value))
    repeat = q.shape[1] // k.shape[1]
    scores = scale * q @ np.repeat(k, repeat, 1).swapaxes(2, 3)
    scores[..., ~np.tri(q.shape[2], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ np.repeat(v, repeat, 1)


@given(
    tokens=st.sampled_from([1, PART - 1, PART, PART + 1, 3 * PART, 200]),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    channels=st.sampled_from([8, 20]),
    scale=st.sampled_from([None, 0.5]),
)
def test_attention_in_parts_is_causal_attention_of_numpy(tokens, heads, channels, scale):
    query, key, value = (heads_of(n, tokens, channels, i) for i, n in enumerate((heads[0], heads[1], heads[1])))
    found = attention_in_parts(query, key, value, scale)
    expected = by_numpy(query, key, value, channels**-0.5 if scale is None else scale)
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_later_token_changes_nothing_before_it():
    query, key, value = (heads_of(2, 200, 16, i) for i in range(3))
    before = attention_in_parts(query, key, value)
    for tensor in (query, key, value):
        tensor[:, :, 130:] = 1e4
    assert torch.equal(attention_in_parts(query, key, value)[:, :, :130], before[:, :, :130])


@pytest.mark.parametrize(
    ("tokens", "keys", "wins"),
    [(2 * PART, 2 * PART, False), (2 * PART + 1, 2 * PART + 1, True), (200, 300, False), (LONGEST + 1, LONGEST + 1, False)],
)  # fmt: skip
def test_parts_are_for_whole_windows_of_some_length(tokens, keys, wins):
    query, key = (torch.empty(1, 1, n, 4) for n in (tokens, keys))
    assert wins_in_parts(query, key) is wins
    assert not wins_in_parts(query.requires_grad_(), key)
