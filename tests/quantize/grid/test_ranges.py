"""Limits of ranges and of the modules' state: what stays finite, what is refused, what survives a move or a reload."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantize.grid.ranges
from quantize.error import relative_error, sqnr_db
from quantize.grid.affine import Grid, dequantize, fake_quantize, fake_quantize_absmax, grid_from_range, grouped
from quantize.grid.affine import quantize as to_codes
from quantize.grid.ranges import RunningRange, dynamic_grid, observed_grid, static_grid, weight_grid
from quantize.modules.simulated import InputQuantizer, QuantLinear, fake_quantize_dynamic
from quantize.spec.quant_spec import QuantSpec

TOKEN = QuantSpec(granularity="token", dynamic=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _normal(rows=12, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_greatest_number_of_a_type_stay_finite(bits, symmetric, dtype):
    limit = torch.finfo(dtype).max
    x = torch.tensor([[-limit, 0.0, limit], [limit, limit, 0.0], [-limit, -limit, 1.0]], dtype=dtype)
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity="token", dynamic=True)
    grid = dynamic_grid(x, spec)
    simulated = fake_quantize_dynamic(x, spec)
    assert torch.isfinite(simulated).all()
    assert torch.equal(simulated, dequantize(to_codes(x, grid), grid, dtype))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from(DTYPES), st.integers(-60, 60))
def test_the_fast_path_of_absmax_scaling_equals_the_definition_bit_for_bit(seed, bits, dtype, power):
    x = (_normal(4, 24, seed) * 2.0**power).clamp(-6e4, 6e4).to(dtype)
    absmax = x.float().abs().amax(-1, keepdim=True)
    expected = fake_quantize(x, grid_from_range(-absmax, absmax, bits, True))
    assert torch.equal(fake_quantize_absmax(x, bits), expected)
    token = QuantSpec(bits=bits, granularity="token", dynamic=True)
    assert torch.equal(fake_quantize_dynamic(x, token), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_activation_that_is_not_finite_spoils_its_own_token_only_and_is_not_hidden(bad, symmetric):
    x = _normal(3, 8)
    x[1, 2] = bad
    y = fake_quantize_dynamic(x, QuantSpec(granularity="token", dynamic=True, symmetric=symmetric))
    assert torch.isfinite(y).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("estimator", ["percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 8)])
def test_chunks_do_not_change_a_range(monkeypatch, estimator, symmetric, granularity, size):
    kept = {"percentile": 90.0} if estimator == "percentile" else {}
    spec = QuantSpec(bits=3, symmetric=symmetric, granularity=granularity, group_size=size, range=estimator, **kept)
    whole = weight_grid(_normal(), spec)
    monkeypatch.setattr(quantize.grid.ranges, "CPU_CHUNK", 70)
    parts = weight_grid(_normal(), spec)
    assert torch.equal(whole.scale, parts.scale)
    assert whole.scale.shape == ((1,) if granularity == "tensor" else (12, 1) if size is None else (12, 4, 1))


def test_chunks_do_not_change_what_columns_weigh(monkeypatch):
    spec, importance = QuantSpec(bits=3, granularity="tensor", range="mse"), torch.linspace(0, 1, 32) ** 6
    whole = weight_grid(_normal(), spec, None, importance)
    monkeypatch.setattr(quantize.grid.ranges, "CPU_CHUNK", 70)
    assert torch.equal(whole.scale, weight_grid(_normal(), spec, None, importance).scale)
    assert not torch.equal(whole.scale, weight_grid(_normal(), spec).scale)


@given(st.integers(2, 200), st.floats(50.5, 100), st.integers(0, 1000))
def test_a_percentile_leaves_out_half_of_the_rest_at_each_end(size, percentile, seed):
    x = _normal(3, size, seed)
    spec = QuantSpec(bits=4, symmetric=False, range="percentile", percentile=percentile)
    ordered = np.sort(x.numpy(), axis=1)
    outside = math.floor(size * (100 - percentile) / 200)
    low, high = (torch.from_numpy(ordered[:, [i]]) for i in (outside, size - 1 - outside))
    found, expected = weight_grid(x, spec), grid_from_range(low, high, 4, False)
    assert torch.equal(found.scale, expected.scale) and torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_ranges_with_the_same_error_the_widest_is_kept(symmetric):
    # Where no column weighs anything, every range has the error 0.
    found = weight_grid(_normal(), QuantSpec(bits=4, symmetric=symmetric, range="mse"), None, torch.zeros(32))
    assert torch.equal(found.scale, weight_grid(_normal(), QuantSpec(bits=4, symmetric=symmetric)).scale)


def test_a_running_range_takes_a_tenth_of_each_sample_after_the_first():
    samples = _normal(30, 6).view(5, 6, 6)
    running = RunningRange()
    with pytest.raises(ValueError, match="has seen no sample"):
        running.range()
    running.update_all(samples)
    low, high = samples[0].numpy().min(0), samples[0].numpy().max(0)
    for sample in samples[1:].numpy():
        low, high = 0.9 * low + 0.1 * sample.min(0), 0.9 * high + 0.1 * sample.max(0)
    found = running.range()
    np.testing.assert_allclose(found[0], low, rtol=1e-5)
    np.testing.assert_allclose(found[1], high, rtol=1e-5)


def test_a_granularity_that_a_tensor_does_not_have_is_refused():
    with pytest.raises(ValueError, match="granularity: 'channel' has no dynamic ranges"):
        dynamic_grid(_normal(), QuantSpec(granularity="channel", dynamic=True))
    with pytest.raises(ValueError, match="granularity: 'token' is for activations"):
        weight_grid(_normal(), QuantSpec(granularity="token"))
    with pytest.raises(ValueError, match="use 6 or 12"):
        grouped(torch.zeros(2, 12), QuantSpec(granularity="group", group_size=7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_static_ranges_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or inf"):
        static_grid(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, bad]), QuantSpec(granularity="tensor"))


def test_error_figures_are_finite_when_the_original_is_zero():
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr_db(zero, one) == -200 and relative_error(zero, one) == pytest.approx(1e10)
    assert sqnr_db(one, one) == 200 and relative_error(one, one) == 0
    nan = torch.full((3,), torch.nan)
    assert math.isnan(sqnr_db(nan, one)) and math.isnan(relative_error(nan, one))
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr_db(zero, torch.zeros(4))


def test_a_quantizer_works_in_inference_mode():
    inputs = InputQuantizer(TOKEN)
    with torch.inference_mode():
        x = _normal()
        first = inputs(x).clone()
        x.mul_(2)
        assert torch.equal(inputs(x), first * 2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "size"), [("channel", None), ("group", 8)])
def test_a_loaded_state_is_what_the_module_multiplies_by(symmetric, granularity, size):
    spec = QuantSpec(bits=4, symmetric=symmetric, granularity=granularity, group_size=size)
    saved, loaded = (QuantLinear(_normal(seed=seed), None, spec) for seed in (0, 1))
    assert not torch.equal(saved.weight, loaded.weight)
    loaded.load_state_dict(saved.state_dict())
    x = _normal(4, 32, seed=2)
    assert torch.equal(loaded.weight, saved.weight) and torch.equal(loaded(x), saved(x))


def test_scales_stay_float32_when_the_model_goes_to_sixteen_bits():
    ranges = torch.full((32,), -1.0), torch.full((32,), 1.0)
    inputs = InputQuantizer(QuantSpec(granularity="tensor", symmetric=False), ranges)
    module = QuantLinear(_normal() * 1e-6, None, QuantSpec(symmetric=False), inputs)
    scale = module.scale.clone()
    module.half()
    assert module.weight.dtype == torch.float16 and torch.equal(module.scale, scale)
    assert {module.zero_point.dtype, inputs.scale.dtype, inputs.zero_point.dtype} == {torch.float32}


def test_a_module_can_be_made_from_codes_alone_and_wrong_codes_are_refused():
    spec = QuantSpec(bits=4, granularity="group", group_size=8)
    nearest = QuantLinear(_normal(), torch.ones(12), spec)
    grid = Grid(nearest.scale, None, -7, 7)
    module = QuantLinear.from_codes(nearest.codes.to(torch.int64), grid, nearest.bias, spec)
    assert torch.equal(module.weight, nearest.weight) and module.codes.dtype == torch.int8 and module.bits == 4
    with pytest.raises(ValueError, match="outside -7 .. 7"):
        QuantLinear.from_codes(nearest.codes + 8, grid, None, spec)
    with pytest.raises(ValueError, match="shape"):
        QuantLinear(_normal(), None, spec, grid=grid, codes=nearest.codes[:1])


def test_a_transposed_weight_gives_the_codes_of_its_contiguous_copy():
    weight = _normal(32, 12).t()
    spec = QuantSpec(granularity="group", group_size=8)
    assert torch.equal(QuantLinear(weight, None, spec).codes, QuantLinear(weight.contiguous(), None, spec).codes)
    assert QuantLinear(weight, None, spec).codes.is_contiguous()


@pytest.mark.parametrize("spec", [
    QuantSpec(bits=3, range="mse"),
    QuantSpec(bits=4, range="mse", granularity="group", group_size=16, symmetric=False),
    QuantSpec(bits=4, range="mse", granularity="tensor"),
])  # fmt: skip
def test_an_error_weighed_by_importance_is_least_for_the_grid_that_was_fitted_to_it(spec):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 64, generator=generator) ** 3
    importance = torch.rand(64, generator=generator) ** 4
    importance[5] = 0

    def error(grid):
        rounded = fake_quantize(grouped(weight, spec), grid).reshape(weight.shape)
        return float(((rounded - weight).square() * importance).sum())

    plain, weighed = weight_grid(weight, spec), weight_grid(weight, spec, None, importance)
    assert error(weighed) < error(plain)
    alike = weight_grid(weight, spec, None, torch.full((64,), 3.0))
    assert torch.equal(alike.scale, plain.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("estimator", ["mse", "percentile"])
def test_ranges_of_channels_that_were_seen_are_those_of_each_channel_by_itself(estimator, symmetric):
    rows = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 24)
    spec = QuantSpec(bits=4, granularity="channel", symmetric=symmetric, range=estimator)
    together = observed_grid(rows, spec)
    alone = [observed_grid(rows[:, i : i + 1], replace(spec, granularity="tensor")) for i in range(24)]
    assert together.scale.shape == (24,) and torch.equal(together.scale, torch.cat([grid.scale for grid in alone]))
    zeros = [grid.zero_point for grid in alone]
    assert (together.zero_point is None) == symmetric
    assert symmetric or torch.equal(together.zero_point, torch.cat(zeros))
