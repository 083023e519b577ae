"""The cache of keys and values: what it holds token by token is what the band of a whole window has rounded, to the code."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.codecs.packing import pack
from quantize.modules.cache import (
    Band,
    CachedStates,
    CacheFormat,
    dequantize_states,
    quantize_states,
    round_states,
)

FORMATS = st.builds(
    CacheFormat,
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([2, 4, 8]),
    along=st.sampled_from(["channels", "tokens"]),
    window=st.integers(0, 9),
    first=st.integers(0, 5),
    search=st.booleans(),
)


def states(tokens, seed=0, channels=8):
    generator = torch.Generator().manual_seed(seed)
    offset = 3 * torch.randn(1, 1, 1, channels, generator=generator)
    return torch.randn(2, 3, tokens, channels, generator=generator) + offset


def settled_by_hand(form, tokens):
    """Walks through the tokens one by one, as the definition reads."""
    rounded, group = min(form.first, tokens), form.group if form.along == "tokens" else 1
    while rounded + group <= tokens - form.window and rounded >= form.first:
        rounded += group
    return rounded


@given(FORMATS, st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_a_group_settles_when_its_last_token_has_left_the_window(form, tokens):
    assert form.settled(tokens) == settled_by_hand(form, tokens)
    every = form.settled_for(0, tokens, torch.device("cpu")).tolist()
    assert every == [form.settled(n) for n in range(1, tokens + 1)]


@given(FORMATS, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_what_is_appended_in_parts_is_held_as_what_came_at_once_and_as_the_band_has_rounded_it(form, parts, seed):
    x, held, whole = states(sum(parts), seed), CachedStates(form), CachedStates(form)
    for part in x.split(parts, 2):
        held.append(part)
    whole.append(x)
    assert held.tokens == x.shape[2] and held.settled == form.settled(x.shape[2])
    assert held.rounded.keys() == whole.rounded.keys()
    assert all(torch.equal(tensor, whole.rounded[name]) for name, tensor in held.rounded.items())
    begin, end = min(form.first, x.shape[2]), held.settled
    if end > begin:
        codes = quantize_states(x[:, :, begin:end], form)["codes"]
        assert torch.equal(held.rounded["codes"], pack(codes, form.bits))
    assert torch.equal(held.read(), Band.of(x, form, 1).rounded)


@given(FORMATS, st.integers(1, 30), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_queries_of_a_whole_window_meet_what_each_would_meet_in_the_cache_alone(form, tokens, chunk, seed):
    x = states(tokens, seed)
    query = torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed + 1))
    weights = torch.rand(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(seed + 2)).tril()
    band, held = Band.of(x, form, tokens), CachedStates(form)
    rows = [slice(i, min(i + chunk, tokens)) for i in range(0, tokens, chunk)]
    scores = torch.cat([band.scores(query[:, :, r], r) for r in rows], 2)
    sums = torch.cat([band.mixed(weights[:, :, r], r) for r in rows], 2)
    for t in range(tokens):
        held.append(x[:, :, t : t + 1])
        now = held.read()
        expected = query[:, :, t : t + 1] @ now.transpose(-1, -2)
        torch.testing.assert_close(scores[:, :, t : t + 1, : t + 1], expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sums[:, :, t : t + 1], weights[:, :, t : t + 1, : t + 1] @ now, rtol=1e-4, atol=1e-3)


@given(FORMATS, st.integers(2, 30), st.integers(1, 29), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_band_over_a_cache_that_has_settled_is_the_band_over_the_whole(form, tokens, past, seed):
    past = min(past, tokens - 1)
    x, held = states(tokens, seed), CachedStates(form)
    held.append(x[:, :, :past])
    settled = held.settled
    there = torch.cat([held.read(), x[:, :, past:]], 2)
    continued, whole = Band.of(there, form, tokens - past, settled), Band.of(x, form, tokens)
    assert torch.equal(continued.rounded, whole.rounded)
    assert torch.equal(continued.settled, whole.settled[past:])


@given(st.integers(2, 8), st.sampled_from(["channels", "tokens"]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_value_moves_by_half_a_step_and_the_rounding_of_the_ends_at_most(bits, along, seed):
    form, x = CacheFormat(bits, 8, along), states(16, seed)
    parts = quantize_states(x, form)
    dim = -1 if along == "channels" else -2
    scale, least = (parts[n].float().unsqueeze(dim) for n in ("scale", "least"))
    blocks = x.unflatten(dim, (-1, 8))
    error = (dequantize_states(parts, form, torch.float32) - x).abs().unflatten(dim, (-1, 8))
    ends = 2.0**-11 * (least.abs() + 2**bits * scale) + 2.0**-24
    assert bool((error <= scale / 2 + ends).all())
    assert int(parts["codes"].max()) <= 2**bits - 1
    assert blocks.shape == error.shape


def test_a_range_away_from_zero_spends_no_code_on_zero():
    x = 40 + torch.linspace(0, 3, 4).view(1, 1, 1, 4)
    assert torch.equal(round_states(x, CacheFormat(2, 4)), x)


def test_the_search_never_raises_the_squared_error_and_lowers_that_of_an_outlier():
    x = states(64, 3)
    x[..., 0, :] *= 10
    for along in ("channels", "tokens"):
        plain = CacheFormat(2, 8, along)
        error = [(round_states(x, f) - x).square().sum() for f in (plain, dataclasses.replace(plain, search=True))]
        assert error[1] < error[0]


def test_constant_zero_and_tiny_groups_come_back_and_nan_is_not_hidden():
    form = CacheFormat(4, 4)
    same = torch.full((1, 1, 2, 4), 0.3)
    torch.testing.assert_close(round_states(same, form), same.half().float())
    assert not round_states(torch.zeros(1, 1, 1, 4), form).any()
    x = torch.tensor([[[[1.0, float("nan"), 2.0, 3.0]]]])
    assert round_states(x, form).isnan().any()


@given(FORMATS, st.integers(1, 40), st.sampled_from([torch.float16, torch.float32]))
@settings(max_examples=40, deadline=None)
def test_the_bytes_that_are_held_are_those_that_shapes_predict(form, tokens, dtype):
    held = CachedStates(form)
    held.append(states(tokens).to(dtype))
    assert held.nbytes == 2 * 3 * form.nbytes(tokens, 8, dtype.itemsize)
    assert held.values == 2 * 3 * tokens * 8
    # No view keeps what has left the window.
    assert held.recent.untyped_storage().nbytes() == held.recent.numel() * dtype.itemsize


def test_four_bits_take_a_quarter_and_their_scales():
    form = CacheFormat(4, 64)
    assert form.nbytes(1000, 64, 2) == 1000 * (32 + 4)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide the 8 channels"):
        quantize_states(states(4), CacheFormat(4, 3))


def test_gradients_pass_through_the_rounding():
    x = states(8).requires_grad_()
    Band.of(x, CacheFormat(4, 8), 1).rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
