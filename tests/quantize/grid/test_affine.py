"""Integer affine quantization: its arithmetic, against numpy in float64, and its limits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantize.error import relative_error, sqnr_db
from quantize.grid.affine import dequantize, fake_quantize, grid_from_range, grouped, integer_range, quantize
from quantize.grid.ranges import dynamic_grid, static_grid, weight_grid
from quantize.spec.quant_spec import QuantSpec, SpecError

bits = st.integers(2, 8)
values = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 24)), elements=st.floats(-1e4, 1e4, width=32))


def spec(b=8, symmetric=True, **more):
    return QuantSpec(bits=b, symmetric=symmetric, **more)


def weight_roundtrip(x, s):
    grid = weight_grid(x, s)
    return fake_quantize(grouped(x, s), grid).reshape(x.shape), grid


def most_moved(grid):
    """Half a step, and what float32 rounds in the division, the zero point and the product of codes up to `high`."""
    return grid.scale.double() * (0.5 + (grid.high - grid.low) * 2.0**-22)


@given(values, bits, st.booleans())
def test_a_value_inside_the_range_moves_by_half_a_step_at_most(array, b, symmetric):
    x = torch.from_numpy(array)
    y, grid = weight_roundtrip(x, spec(b, symmetric))
    assert ((x.double() - y.double()).abs() <= most_moved(grid)).all()


@given(st.integers(-(10**6), 0), st.integers(0, 10**6), st.sampled_from([1e-4, 1.0, 3e5]), bits)
def test_the_ends_of_an_asymmetric_range_move_by_half_a_step_at_most_though_its_zero_point_is_rounded(a, c, unit, b):
    low, high = torch.tensor([a * unit]), torch.tensor([c * unit])
    grid = grid_from_range(low, high, b, False)
    x = torch.lerp(low, high, torch.linspace(0, 1, 3001)).clamp(low, high)
    assert ((x.double() - fake_quantize(x, grid).double()).abs() <= most_moved(grid)).all()


@given(st.integers(0, 2**8 - 2))
def test_a_zero_point_half_way_between_two_codes_costs_half_a_step_at_both_ends(k):
    # -minimum / scale is exactly k + 1/2: the worst case of rounding it.
    x = torch.tensor([-(k + 0.5), 255 - (k + 0.5)])
    grid = grid_from_range(x[:1], x[1:], 8, False)
    assert grid.scale.item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close((x - fake_quantize(x, grid)).abs(), torch.full((2,), 0.5), rtol=1e-4, atol=0)


@given(values, bits, st.booleans())
def test_quantizing_twice_changes_nothing_more(array, b, symmetric):
    x = torch.from_numpy(array)
    grid = weight_grid(x, spec(b, symmetric))
    once = fake_quantize(x, grid)
    assert torch.equal(quantize(once, grid), quantize(x, grid))
    assert torch.equal(fake_quantize(once, grid), once)


@given(values, bits, st.booleans(), st.integers(-8, 8))
def test_scaling_by_a_power_of_two_scales_the_result_exactly(array, b, symmetric, power):
    x = torch.from_numpy(array)
    x = torch.where(x.abs() < 1e-20, torch.zeros_like(x), x)
    scaled, _ = weight_roundtrip(x * 2.0**power, spec(b, symmetric))
    plain, _ = weight_roundtrip(x, spec(b, symmetric))
    assert torch.equal(scaled, plain * 2.0**power)


@given(values, bits, st.booleans())
def test_the_simulation_is_the_stored_codes_dequantized(array, b, symmetric):
    x = torch.from_numpy(array)
    grid = weight_grid(x, spec(b, symmetric))
    codes = quantize(x, grid)
    low, high = integer_range(b, symmetric)
    assert codes.min() >= low and codes.max() <= high
    assert codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert torch.equal(dequantize(codes, grid), fake_quantize(x, grid))


@given(values, bits)
def test_symmetric_codes_equal_numpy_in_float64(array, b):
    x = torch.from_numpy(array)
    high = 2 ** (b - 1) - 1
    reference = array.astype(np.float64)
    scale = np.abs(reference).max(axis=1, keepdims=True) / high
    scale[scale < np.finfo(np.float32).tiny] = 1
    exact = reference / scale
    codes = quantize(x, weight_grid(x, spec(b))).numpy()
    # float32 may round a value that lies within its own precision of the middle between two codes the other way.
    ties = np.abs(np.abs(exact - np.round(exact)) - 0.5) < 1e-4
    assert ((codes == np.round(exact)) | ties).all()


@given(values, bits)
def test_asymmetric_codes_follow_the_zero_point_rule_in_numpy(array, b):
    x = torch.from_numpy(array)
    reference = array.astype(np.float64)
    top = 2**b - 1
    low, high = np.minimum(reference.min(1, keepdims=True), 0), np.maximum(reference.max(1, keepdims=True), 0)
    scale = (high - low) / top
    scale[scale < np.finfo(np.float32).tiny] = 1
    codes = quantize(x, weight_grid(x, spec(b, symmetric=False))).numpy().astype(int)
    expected = np.clip(np.round(reference / scale) + np.round(-low / scale), 0, top)
    assert (np.abs(codes - expected) <= 1).all()
    assert (codes == expected).mean() > 0.95 or np.abs(codes - expected).sum() <= 2


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 4, 8]), st.booleans())
def test_groups_are_quantized_each_alone(rows, groups, size, symmetric):
    x = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(rows * groups))
    whole, _ = weight_roundtrip(x, spec(4, symmetric, granularity="group", group_size=size))
    alone = [weight_roundtrip(part.contiguous(), spec(4, symmetric))[0] for part in x.split(size, dim=1)]
    assert torch.equal(whole, torch.cat(alone, dim=1))


def test_the_worked_examples_of_absmax_scaling_come_out():
    x = torch.tensor([[2.1, 3.1, 2.5, 3.7, 3.3]])
    grid = weight_grid(x, spec())
    assert quantize(x, grid).tolist() == [[72, 106, 86, 127, 113]]
    expected = torch.tensor([[2.0976, 3.0882, 2.5055, 3.7, 3.2921]])
    torch.testing.assert_close(fake_quantize(x, grid), expected, atol=5e-5, rtol=0)
    groups = spec(granularity="group", group_size=2)
    x = torch.tensor([[3.0, 5.0, 2.0, 4.0]])
    assert quantize(grouped(x, groups), weight_grid(x, groups)).flatten().tolist() == [76, 127, 64, 127]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("estimator", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("kind", ["zero", "constant", "negative", "subnormal", "huge", "mixed"])
def test_odd_inputs_give_finite_results(granularity, symmetric, estimator, kind):
    x = {
        "zero": torch.zeros(3, 8),
        "constant": torch.full((3, 8), 7.5),
        "negative": torch.full((3, 8), -2.0),
        "subnormal": torch.full((3, 8), 1e-42),
        "huge": 3.3e38 * torch.linspace(-1, 1, 24).view(3, 8),
        "mixed": torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e-30), torch.full((1, 8), 1e30)]),
    }[kind]
    size = 4 if granularity == "group" else None
    s = QuantSpec(bits=4, symmetric=symmetric, granularity=granularity, group_size=size, range=estimator)
    y, grid = weight_roundtrip(x, s)
    assert torch.isfinite(y).all() and torch.isfinite(grid.scale).all() and (grid.scale > 0).all()
    if kind in {"zero", "constant", "negative"}:
        torch.testing.assert_close(y, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_whole_range_of_sixteen_bit_types_is_finite(symmetric, dtype):
    limit = torch.finfo(dtype).max if dtype == torch.float16 else 1e38
    x = torch.tensor([[-limit, -1.0, 0.0, 1.0, limit]], dtype=dtype)
    s = QuantSpec(granularity="token", dynamic=True, symmetric=symmetric)
    y = fake_quantize(x, dynamic_grid(x, s))
    assert y.dtype == dtype and torch.isfinite(y).all()


def test_the_mse_range_is_never_worse_than_minmax_and_better_with_an_outlier():
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 12
    plain, best = (weight_roundtrip(x, QuantSpec(bits=3, range=r))[0] for r in ("minmax", "mse"))
    error = [(x - y).square().sum(1) for y in (plain, best)]
    assert (error[1] <= error[0]).all() and error[1].sum() < 0.9 * error[0].sum()


def test_a_percentile_range_cuts_the_outlier_off():
    x = torch.linspace(-1, 1, 1000)[None]
    x[0, 0] = -100
    grid = weight_grid(x, QuantSpec(range="percentile", percentile=99.0))
    assert grid.scale.item() * 127 < 1.01


def test_static_ranges_come_from_the_channels_of_the_statistics():
    low, high = torch.tensor([-1.0, -4.0]), torch.tensor([2.0, 0.5])
    tensor = static_grid(low, high, QuantSpec(granularity="tensor", symmetric=False))
    assert tensor.scale.item() == pytest.approx(6 / 255)
    channel = static_grid(low, high, QuantSpec(granularity="channel"))
    torch.testing.assert_close(channel.scale, torch.tensor([2.0, 4.0]) / 127)
    with pytest.raises(ValueError, match="granularity"):
        static_grid(low, high, QuantSpec(granularity="token", dynamic=True))


def test_a_group_size_that_does_not_divide_is_refused_with_the_nearest_that_does():
    with pytest.raises(ValueError, match="group_size: 7 does not divide the last dimension 12: use 6"):
        grouped(torch.zeros(2, 12), QuantSpec(granularity="group", group_size=7))


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 1}, {"bits": 9}, {"format": "int4"}, {"granularity": "row"}, {"granularity": "group"}, {"group_size": 4},
     {"range": "max"}, {"percentile": 10.0}, {"granularity": "group", "group_size": 0}],
)  # fmt: skip
def test_a_spec_without_meaning_is_refused_by_field(wrong):
    with pytest.raises(SpecError) as error:
        QuantSpec(**wrong)
    assert error.value.field in str(error.value)


def test_error_figures_match_their_formulas_and_stay_finite_at_zero():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    y = x + 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert sqnr_db(x, y) == pytest.approx(40, abs=0.3) and relative_error(x, y) == pytest.approx(0.01, rel=0.05)
    zero = torch.zeros(3)
    assert sqnr_db(zero, zero) == 200 and relative_error(zero, zero) == 0


def test_eight_bit_rounding_of_a_gaussian_has_the_noise_that_theory_gives():
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    y, grid = weight_roundtrip(x, spec())
    expected = 10 * torch.log10(x.square().mean() / (grid.scale.square() / 12).mean())
    assert sqnr_db(x, y) == pytest.approx(expected.item(), abs=0.05)


def test_a_range_of_huge_values_does_not_overflow():
    grid = grid_from_range(torch.tensor([-3.4e38]), torch.tensor([3.4e38]), 8, False)
    assert torch.isfinite(grid.scale).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_full_symmetric_range_spreads_all_codes_over_both_ends(bits):
    low, high = torch.tensor([-3.0, -1.0, 0.0]), torch.tensor([1.0, 2.5, 7.0])
    grid = grid_from_range(low, high, bits, True, full_range=True)
    np.testing.assert_allclose(grid.scale, 2 * np.array([3.0, 2.5, 7.0]) / (2**bits - 1), rtol=1e-6)
    assert (grid.low, grid.high, grid.zero_point) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, None)
