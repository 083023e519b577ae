"""HQQ: its shrinkage against the minimum found by trying, and ranges never worse than minmax in the lp norm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import fake_quantize, grouped
from quantize.grid.ranges import weight_grid
from quantize.solvers.hqq import hqq_grid, shrunk
from quantize.spec.quant_spec import QuantSpec

SPECS = [
    QuantSpec(bits=4),
    QuantSpec(bits=3, symmetric=False),
    QuantSpec(bits=2, granularity="group", group_size=16, symmetric=False),
    QuantSpec(bits=3, granularity="group", group_size=16, symmetric=False, scales="float16"),
    QuantSpec(bits=4, granularity="tensor", symmetric=False),
    QuantSpec(bits=3, granularity="cluster", symmetric=False),
]


def weights(rows=8, columns=48, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def lp(weight, grid, spec, labels=None, norm=0.7):
    if labels is not None:
        values = fake_quantize(weight, grid.of_channels(labels))
    else:
        values = fake_quantize(grouped(weight, spec), grid).reshape(weight.shape)
    powers = (weight - values).double().abs() ** norm
    if labels is not None:
        return torch.stack([powers[:, labels == k].sum(1) for k in range(3)], dim=1)
    return powers.sum() if spec.granularity == "tensor" else grouped(powers, spec).sum(-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(SPECS), st.sampled_from([1e-5, 1.0, 300.0]))
def test_no_scale_of_its_own_is_worse_than_minmax_in_the_lp_norm(rows, seed, spec, size):
    weight = weights(rows, 48, seed) * size
    labels = torch.arange(48) % 3 if spec.granularity == "cluster" else None
    grid, plain = hqq_grid(weight, spec, labels), weight_grid(weight, spec, labels)
    assert grid.scale.shape == plain.scale.shape and (grid.zero_point is None) == spec.symmetric
    if grid.zero_point is not None:
        assert torch.equal(grid.zero_point, grid.zero_point.round().clamp(grid.low, grid.high))
    assert (lp(weight, grid, spec, labels) <= lp(weight, plain, spec, labels) * (1 + 1e-4)).all()
    if spec.scales == "float16" and size == 1.0:
        assert torch.equal(grid.scale, grid.scale.half().float())


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_it_is_better_than_minmax_with_outliers(spec):
    weight = weights(16, 48)
    weight[:, 7] *= 8
    assert lp(weight, hqq_grid(weight, spec), spec).mean() < 0.97 * lp(weight, weight_grid(weight, spec), spec).mean()


def test_the_shrinkage_leaves_nothing_of_small_errors_and_almost_all_of_great_ones():
    error = torch.tensor([0.0, 0.05, -0.05, 0.5, -3.0])
    found = shrunk(error, 10.0)
    threshold = error.abs().pow(-0.3) / 10
    assert torch.equal(found[:3], torch.zeros(3))
    torch.testing.assert_close(found[3:], error[3:] - error.sign()[3:] * threshold[3:])
    torch.testing.assert_close(shrunk(error, 10.0, 1.0), torch.nn.functional.softshrink(error, 0.1))


@pytest.mark.parametrize(("error", "near"), [(0.3, 1.1), (0.8, 1.01), (2.0, 1.001)])
def test_the_shrinkage_is_to_first_order_the_minimum_of_what_it_stands_for(error, near):
    """|e|^p / p + beta / 2 (e - x)^2 on a fine grid of e."""
    tried = np.append(np.linspace(1e-4, error, 20000), 0.0)
    values, found = (
        np.abs(e) ** 0.7 / 0.7 + 5.0 * (e - error) ** 2 for e in (tried, float(shrunk(torch.tensor([error]), 10.0)))
    )
    assert found < values[-2] and found < near * values.min()


def test_no_iteration_is_minmax_and_the_result_is_the_same_twice_for_any_power_of_two():
    weight = weights()
    assert torch.equal(hqq_grid(weight, SPECS[2], iterations=0).scale, weight_grid(weight, SPECS[2]).scale)
    first, again, scaled = (hqq_grid(w, SPECS[2]) for w in (weight, weight, weight * 2.0**-9))
    assert torch.equal(first.scale, again.scale) and torch.equal(first.zero_point, again.zero_point)
    assert torch.equal(scaled.scale, first.scale * 2.0**-9)
    half = hqq_grid(weight.half(), SPECS[0])
    assert torch.equal(half.scale, hqq_grid(weight.half().float(), SPECS[0]).scale)


def test_an_all_zero_weight_keeps_its_grid_and_what_makes_no_sense_is_refused():
    for spec in SPECS[:4]:
        grid = hqq_grid(torch.zeros(4, 48), spec)
        assert torch.equal(grid.scale, weight_grid(torch.zeros(4, 48), spec).scale)
    with pytest.raises(ValueError, match="norm: 0 is not valid"):
        hqq_grid(weights(), SPECS[0], norm=0)
    with pytest.raises(ValueError, match="weight: holds NaN"):
        hqq_grid(weights() * torch.nan, SPECS[0])
    with pytest.raises(ValueError, match="needs labels"):
        hqq_grid(weights(), SPECS[5])
