"""Coordinate descent: never up, closed forms against least squares, and the optimum of tiny problems by trying everything."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import dequantize, quantize
from quantize.grid.labelled_grid import column_labels, fitted_grid
from quantize.solvers.descent import descend
from quantize.solvers.gptq import GptqOptions, solve
from quantize.solvers.levels import IntegerLevels
from quantize.spec.quant_spec import QuantSpec
from tests.quantize.solvers.problems import best_of_all, losses, problem

SPECS = [
    QuantSpec(bits=4),
    QuantSpec(bits=3, symmetric=False),
    QuantSpec(bits=2, granularity="group", group_size=8, symmetric=False),
    QuantSpec(bits=3, granularity="group", group_size=8),
    QuantSpec(bits=4, granularity="tensor", symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=8, symmetric=False, scales="float16_min"),
    QuantSpec(bits=4, granularity="group", group_size=8, scales="float16"),
]


def nearest(weight, spec):
    """Levels (in, out) of rounding to nearest, and what they are levels of."""
    labels = column_labels(weight, spec, None)
    grid = fitted_grid(weight, spec, labels, torch.ones(weight.shape[1]))
    codes = quantize(weight, grid.spread(labels)).float()
    zero = 0 if grid.zero_point is None else grid.zero_point[:, labels]
    return (codes - zero).t().contiguous(), IntegerLevels(grid, len(weight), spec.scales), labels


def values(steps, levels, labels):
    return (steps * levels.scale[labels]).t()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([8, 24]),
    st.integers(1, 60),
    st.integers(0, 2**31),
    st.sampled_from(SPECS),
    st.integers(1, 4),
)
def test_the_weighed_error_never_rises_and_more_sweeps_never_cost(rows, columns, tokens, seed, spec, sweeps):
    weight, hessian = problem(rows, columns, tokens, seed)
    before = None
    for n in range(sweeps + 1):
        steps, levels, labels = nearest(weight, spec)
        steps = descend(weight, hessian, steps, levels, labels, n)
        found = losses(weight, values(steps, levels, labels), hessian)
        slack = 1e-5 * losses(weight, torch.zeros_like(weight), hessian)
        if spec.granularity == "tensor":
            found, slack = found.sum(), slack.sum()
        assert before is None or (found <= before + slack).all()
        before = found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_it_gives_is_on_the_grid_that_it_gives(spec):
    weight, hessian = problem(seed=4)
    solution = solve(weight, hessian, spec, GptqOptions(descent=3))
    labels = column_labels(weight, spec, None)
    grid = solution.grid
    spread = grid.scale.reshape(-1, grid.scale.numel() // (1 if spec.granularity == "tensor" else 12))[:, labels]
    codes = solution.codes.float()
    assert codes.min() >= grid.low and codes.max() <= grid.high and codes.unique().numel() > 2
    if grid.zero_point is not None:
        assert torch.equal(grid.zero_point, grid.zero_point.round().clamp(grid.low, grid.high))
        codes = codes - grid.zero_point.reshape(spread.shape[0], -1)[:, labels]
    assert losses(weight, codes * spread, hessian).mean() / 2 == pytest.approx(solution.loss, rel=1e-4)
    if spec.scales != "float32":
        assert torch.equal(grid.scale, grid.scale.half().float())
    if spec.scales == "float16_min":
        least = grid.scale * grid.zero_point
        assert torch.equal(least, least.half().float())


def test_a_scale_is_the_least_squares_fit_to_its_levels():
    weight, hessian = problem(3, 16)
    spec = QuantSpec(bits=3)
    steps, levels, labels = nearest(weight, spec)
    root = np.linalg.cholesky(hessian.double().numpy())
    fits = [np.linalg.lstsq((root.T @ s.double().numpy())[:, None], root.T @ w.double().numpy(), rcond=None)[0][0] for s, w in zip(steps.t(), weight, strict=True)]  # fmt: skip
    # Columns without slope: only the scales can move.
    plain = steps.clone()
    from quantize.solvers.descent import _rescale

    slope = hessian @ (weight.t() - plain * levels.scale[labels])
    _rescale(hessian, slope, plain, levels, 0, torch.arange(16))
    np.testing.assert_allclose(levels.scale[0].numpy(), fits, rtol=1e-4)
    np.testing.assert_allclose(
        slope.numpy(), (hessian @ (weight.t() - plain * levels.scale[labels])).numpy(), atol=1e-4
    )


def test_where_it_ends_no_single_code_can_be_changed_for_the_better():
    weight, hessian = problem(6, 16)
    spec = QuantSpec(bits=3)
    steps, levels, labels = nearest(weight, spec)
    steps = descend(weight, hessian, steps, levels, labels, 50)
    base = losses(weight, values(steps, levels, labels), hessian)
    for j in range(16):
        for move in (-1, 1):
            tried = steps.clone()
            tried[j] = (tried[j] + move).clamp(-3, 3)
            assert (losses(weight, values(tried, levels, labels), hessian) >= base * (1 - 1e-5)).all()


def test_on_tiny_problems_it_is_between_rounding_to_nearest_and_the_best_of_all_codes():
    reached, nearer = 0, 0
    for seed in range(20):
        weight, hessian = problem(1, 3, 50, seed)
        spec = QuantSpec(bits=3)
        steps, levels, labels = nearest(weight, spec)
        first = losses(weight, values(steps, levels, labels), hessian)[0]
        steps = descend(weight, hessian, steps, levels, labels, 20)
        found = losses(weight, values(steps, levels, labels), hessian)[0]
        best = best_of_all(weight[0], levels.scale[0].expand(3), range(-3, 4), hessian)
        assert best <= found * (1 + 1e-5) and found <= first * (1 + 1e-5)
        reached += found <= best * (1 + 1e-4)
        nearer += found < first
    assert reached >= 12 and nearer >= 12


def test_the_block_changes_nothing_but_the_time_and_the_result_is_the_same_twice():
    weight, hessian = problem(8, 48)
    spec = SPECS[2]
    results = []
    for block in (128, 128, 7):
        steps, levels, labels = nearest(weight, spec)
        steps = descend(weight, hessian, steps, levels, labels, 3, block)
        results.append((steps, levels.scale, losses(weight, values(steps, levels, labels), hessian)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    np.testing.assert_allclose(results[0][2], results[2][2], rtol=0.05)


def test_a_zero_point_that_is_off_by_whole_steps_is_put_right():
    weight, hessian = problem(4, 16)
    spec = QuantSpec(bits=4, symmetric=False)
    steps, levels, labels = nearest(weight, spec)
    right = losses(weight, values(steps, levels, labels), hessian)
    moved = levels.shift(0, torch.tensor([1.0, -1.0, 0.0, 2.0]))
    steps = descend(weight, hessian, steps + moved, levels, labels, 5)
    zero = levels.grid().zero_point
    assert torch.equal(zero, zero.round().clamp(0, 15))
    assert (losses(weight, values(steps, levels, labels), hessian) <= right * 1.01).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_after_gptq_it_lowers_the_loss(spec):
    weight, hessian = problem(24, 48, 400, seed=2)
    plain, better = (solve(weight, hessian, spec, GptqOptions(descent=n)) for n in (0, 4))
    assert better.loss < plain.loss and better.rtn_loss == plain.rtn_loss


def test_columns_that_no_token_used_stay_zero():
    weight, hessian = problem()
    hessian[[3, 17]] = 0
    hessian[:, [3, 17]] = 0
    solution = solve(weight, hessian, QuantSpec(bits=4), GptqOptions(descent=3))
    assert (dequantize(solution.codes, solution.grid)[:, [3, 17]] == 0).all()
