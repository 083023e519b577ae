"""The trellis format: its search against brute force, what it stores, and how near it comes to a Gaussian weight."""

import hashlib
import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.codecs.base import stored_bytes
from quantize.codecs.packing import unpack
from quantize.codecs.registry import codec_of
from quantize.codecs.trellis.codec import SIDE, STATE_BITS, STATES, UNIT, sequences, state_values, weights_of
from quantize.codecs.trellis.viterbi import Viterbi
from quantize.modules.packed_embedding import packed_embedding
from quantize.solvers.tiles.block_feedback import factorise_blocks
from quantize.spec.quant_spec import QuantSpec, SpecError, spec_of
from tests.quantize.reference import normal

TRELLIS = codec_of(spec_of("trellis"))
DISTORTIONS = {2: 0.076, 3: 0.0205, 4: 0.0055}
"""On N(0, 1): the bound 4^-bits is 0.0625, 0.0156 and 0.0039, Lloyd-Max levels have 0.1175, 0.0345 and 0.0095."""


def every_path(state_bits, bits, steps):
    """All sequences of states as lists, by what was shifted in before the first step and at each one."""
    for before in range(2 ** (state_bits - bits)):
        for symbols in itertools.product(range(2**bits), repeat=steps):
            states, state = [], before
            for symbol in symbols:
                state = (state << bits | symbol) % 2**state_bits
                states.append(state)
            yield before, states


def cost_of(states, x, values, weights):
    return sum(w * (float(a) - float(values[s])) ** 2 for s, a, w in zip(states, x, weights, strict=True))


small = given(st.sampled_from([(4, 1, 6), (4, 2, 4), (5, 2, 4), (4, 3, 3)]), st.integers(0, 999))


def small_case(shape, seed):
    state_bits, bits, steps = shape
    values, x = normal(2**state_bits, seed=seed), normal(steps, 3, seed=seed + 1)
    weights = (normal(steps, seed=seed + 2).abs() + 0.1).tolist()
    return Viterbi(values, bits), values, x, weights, list(every_path(state_bits, bits, steps))


@small
def test_a_path_costs_what_the_best_of_all_paths_costs(shape, seed):
    search, values, x, weights, paths = small_case(shape, seed)
    found = search.paths(x, weights)
    known = [states for _, states in paths]
    for i in range(x.shape[1]):
        assert found[:, i].tolist() in known
        best = min(cost_of(states, x[:, i], values, weights) for states in known)
        assert cost_of(found[:, i].tolist(), x[:, i], values, weights) == pytest.approx(best, abs=1e-5)


@small
def test_a_path_between_given_ends_costs_what_the_best_of_those_costs(shape, seed):
    search, values, x, weights, paths = small_case(shape, seed)
    edges = torch.arange(x.shape[1]) % search.kept
    found = search.paths(x, weights, edges)
    for i, edge in enumerate(edges.tolist()):
        known = [states for before, states in paths if before == edge == states[-1] % search.kept]
        assert found[:, i].tolist() in known
        best = min(cost_of(states, x[:, i], values, weights) for states in known)
        assert cost_of(found[:, i].tolist(), x[:, i], values, weights) == pytest.approx(best, abs=1e-5)


@small
def test_a_loop_closes_and_is_the_best_one_through_its_end(shape, seed):
    search, values, x, weights, paths = small_case(shape, seed)
    found = search.loops(x, weights)
    for i in range(x.shape[1]):
        mine = found[:, i].tolist()
        edge = mine[-1] % search.kept
        known = [states for before, states in paths if before == edge == states[-1] % search.kept]
        assert mine in known
        best = min(cost_of(states, x[:, i], values, weights) for states in known)
        assert cost_of(mine, x[:, i], values, weights) == pytest.approx(best, abs=1e-5)


def test_what_the_table_can_say_is_found_without_an_error_in_any_batch():
    values, count = state_values().on(torch.device("cpu")), 130
    symbols = torch.randint(0, 4, (SIDE * SIDE, count), generator=torch.Generator().manual_seed(0))
    states = sum(symbols.roll(age, 0) << (2 * age) for age in range(STATE_BITS // 2))
    assert torch.equal(Viterbi(values, 2).loops(values[states]), states)


def test_the_values_are_the_quantiles_of_a_normal_and_the_same_everywhere():
    units = state_values().on(torch.device("cpu")).double() * UNIT
    assert torch.equal(units, units.round())
    exact = [NormalDist().inv_cdf((rank + 0.5) / STATES) * UNIT for rank in range(STATES)]
    assert units.sort().values.tolist() == [round(q) for q in exact]
    # So far from the middle between two whole numbers that no library's last digit decides.
    assert min(abs(q - math.floor(q) - 0.5) for q in exact) > 1e-6
    digest = hashlib.sha256(units.to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()
    assert digest.startswith("6b4cf9080fa0c8ca")


@pytest.mark.parametrize("bits", DISTORTIONS)
def test_a_gaussian_weight_loses_far_less_than_with_the_best_levels_of_as_many_bits(bits):
    x, spec = normal(128, 128, seed=3), spec_of("trellis", bits=bits)
    decoded = TRELLIS.decode(TRELLIS.encode(x, spec), spec, x.shape)
    assert ((x - decoded).square().mean() / x.square().mean()).item() < DISTORTIONS[bits]


@pytest.mark.parametrize("bits", DISTORTIONS)
def test_a_tile_takes_its_bits_and_no_more_and_a_row_one_scale(bits):
    x, spec = normal(32, 48, seed=4), spec_of("trellis", bits=bits)
    stored = TRELLIS.encode(x, spec)
    assert stored["codes"].shape == (2, 3 * 32 * bits)
    assert 8 * stored_bytes(stored) == x.numel() * bits + 32 * 32
    assert torch.equal(TRELLIS.fake(x, spec), TRELLIS.decode(stored, spec, x.shape))


def test_a_weights_value_is_that_of_the_bits_before_it_around_its_tile():
    """Decoded one by one, from the definition."""
    x, spec = normal(20, 32, seed=5), spec_of("trellis")
    stored = TRELLIS.encode(x, spec)
    decoded = TRELLIS.decode(stored, spec, x.shape)
    codes = unpack(stored["codes"], 2, SIDE * 32).view(2, 2, 256)
    values = state_values().on(x.device)
    for row, column in ((0, 0), (3, 17), (15, 31), (19, 5)):
        tile, place = codes[row // 16, column // 16], row % 16 * 16 + column % 16
        state = 0
        for age in range(5, -1, -1):
            state = 4 * state + int(tile[(place - age) % 256])
        assert decoded[row, column] == values[state] * stored["scale"][row, 0]


def test_rows_beyond_the_last_whole_tile_are_coded_as_well_as_others():
    x, spec = normal(33, 64, seed=6), spec_of("trellis")
    error = (x - TRELLIS.fake(x, spec)).square().mean(1)
    assert TRELLIS.encode(x, spec)["codes"].shape == (3, 4 * 64)
    assert error[32] < 0.1


def test_a_row_with_an_outlier_has_a_wider_scale_and_loses_less_than_on_its_deviation():
    x, spec = normal(16, 256, seed=7), spec_of("trellis")
    x[0, 5] = 25.0
    size = x.square().mean(1, keepdim=True).sqrt()
    scale = TRELLIS.scale(x)
    assert torch.allclose(scale[1:], size[1:]) and scale[0] > 1.3 * size[0]
    states = TRELLIS.viterbi(spec, x.device).loops(sequences(x / size))
    plain = weights_of(state_values().on(x.device)[states], *x.shape) * size
    assert (x - TRELLIS.fake(x, spec))[0].square().sum() < 0.9 * (x - plain)[0].square().sum()


def test_shapes_and_uses_that_it_does_not_fit_are_refused_by_name():
    spec = spec_of("trellis")
    for shape in ((16, 40), (2, 3, 16)):
        with pytest.raises(
            ValueError, match=r"'trellis' codes tiles of 16 columns.*: use int with granularity channel"
        ):
            TRELLIS.encode(torch.ones(shape), spec)
    with pytest.raises(ValueError, match="'trellis' stores tiles of 16 rows, and no row by itself"):
        packed_embedding(torch.nn.Embedding(32, 64), spec)
    with pytest.raises(SpecError, match="granularity: 'group' is not valid: expected channel with format trellis"):
        QuantSpec(bits=2, format="trellis", granularity="group", group_size=64)
    with pytest.raises(SpecError, match="bits: 8 is not valid: expected 2 with format trellis"):
        QuantSpec(format="trellis")


def test_tiles_and_sequences_are_inverses():
    x = normal(37, 48)
    assert torch.equal(weights_of(sequences(x), *x.shape), x)
    assert sequences(x).shape == (256, 9)


def test_blocks_of_columns_are_ordered_as_wholes():
    diagonal = torch.arange(64.0).add(1)
    factor = factorise_blocks(diagonal.diag(), 0.01, True)
    assert factor.order.view(4, 16)[:, 0].tolist() == [48, 32, 16, 0]
    assert all(torch.equal(block - block[0], torch.arange(16)) for block in factor.order.view(4, 16))
    assert torch.equal(factorise_blocks(diagonal.diag(), 0.01, False).order, torch.arange(64))
