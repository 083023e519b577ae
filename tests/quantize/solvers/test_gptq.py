"""GPTQ: against a slow version in numpy by another derivation, against rounding to nearest, and at its limits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import dequantize, fake_quantize, grouped
from quantize.grid.affine import quantize as to_codes
from quantize.grid.ranges import weight_grid
from quantize.modules.simulated import QuantLinear
from quantize.solvers.gptq import GptqOptions, Hessian, Solution, solve
from quantize.spec.quant_spec import QuantSpec

GROUP = 8
SPECS = [
    QuantSpec(bits=4),
    QuantSpec(bits=4, symmetric=False),
    QuantSpec(bits=3, granularity="group", group_size=GROUP),
    QuantSpec(bits=4, granularity="group", group_size=GROUP, symmetric=False),
    QuantSpec(bits=4, granularity="tensor", symmetric=False),
    QuantSpec(bits=3, granularity="tensor"),
]


def name_of(spec):
    return f"{spec.granularity}-{'symmetric' if spec.symmetric else 'asymmetric'}"


every_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)


def problem(rows=12, columns=32, tokens=200, seed=0):
    """A weight, and inputs whose channels are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    x = (torch.randn(tokens, columns, generator=generator) @ mix) * torch.rand(columns, generator=generator).add(0.2)
    return torch.randn(rows, columns, generator=generator), x


def hessian_of(x):
    hessian = Hessian(x.shape[-1])
    hessian.update(x)
    return hessian.matrix


def values_of(solution: Solution, spec: QuantSpec) -> torch.Tensor:
    return dequantize(grouped(solution.codes, spec), solution.grid).reshape(solution.codes.shape)


def output_errors(weight, quantized, x):
    """Mean over tokens of each row's squared output error, in float64."""
    return ((weight - quantized).double() @ x.double().t()).square().mean(1)


def nearest(weight, spec):
    return fake_quantize(grouped(weight, spec), weight_grid(weight, spec)).reshape(weight.shape)


class Slow:
    """Optimal brain quantization in a fixed order, in float64: after each column it is eliminated from the inverse Hessian."""

    def __init__(self, weight, hessian, labels, spec, options):
        self.w = weight.numpy().astype(np.float64).copy()
        self.spec, self.labels = spec, labels
        h = hessian.numpy().astype(np.float64).copy()
        self.inverse = np.linalg.inv(h + options.damping * np.diag(h).mean() * np.eye(len(h)))
        self.order = np.argsort(-np.diag(h), kind="stable") if options.act_order else np.arange(len(h))
        self.margin = np.full(len(self.w), np.inf)
        self.codes = np.zeros(self.w.shape, dtype=int)
        self.grids = {}
        if options.static_groups:
            self.grids = {k: self.fit(k) for k in set(labels)}

    def fit(self, label):
        values = self.w[:, self.labels == label]
        if self.spec.granularity == "tensor":
            values = np.broadcast_to(values.reshape(1, -1), (len(self.w), values.size))
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        if self.spec.symmetric:
            top = 2 ** (self.spec.bits - 1) - 1
            return np.maximum(-low, high) / top, np.zeros(len(low)), -top, top
        top = 2**self.spec.bits - 1
        scale = (high - low) / top
        self.note(-low / scale)
        return scale, np.round(-low / scale), 0, top

    def note(self, exact):
        """Remembers how near to the middle between two whole numbers a row came: there float32 may differ."""
        self.margin = np.minimum(self.margin, np.abs(np.abs(exact - np.round(exact)) - 0.5))

    def run(self):
        for j in self.order:
            if self.labels[j] not in self.grids:
                self.grids[self.labels[j]] = self.fit(self.labels[j])
            scale, zero, low, high = self.grids[self.labels[j]]
            exact = self.w[:, j] / scale
            self.note(exact)
            self.codes[:, j] = np.clip(np.round(exact) + zero, low, high)
            error = self.w[:, j] - (self.codes[:, j] - zero) * scale
            pivot = self.inverse[j, j]
            self.w -= np.outer(error / pivot, self.inverse[j])
            self.inverse -= np.outer(self.inverse[:, j], self.inverse[j]) / pivot
        return self


@every_spec
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("block", [5, 128])
def test_codes_equal_those_of_a_slow_version_by_elimination(spec, act_order, static_groups, block):
    compared = 0
    for seed in range(3):
        weight, x = problem(seed=seed)
        options = GptqOptions(block=block, act_order=act_order, static_groups=static_groups)
        hessian = hessian_of(x)
        solution = solve(weight, hessian, spec, options)
        labels = np.arange(32) // (GROUP if spec.granularity == "group" else 32)
        slow = Slow(weight, hessian, labels, spec, options).run()
        clear = slow.margin > 1e-3
        kept = (
            output_errors(weight, values_of(solution, spec), x) < output_errors(weight, nearest(weight, spec), x)
        ).numpy()
        assert (solution.codes.numpy().astype(int) == slow.codes)[clear & kept].all()
        compared += (clear & kept).sum()
    assert compared > 18


@every_spec
def test_with_an_identity_hessian_it_is_rounding_to_nearest(spec):
    weight, _ = problem()
    solution = solve(weight, torch.eye(32), spec, GptqOptions())
    grid = weight_grid(weight, spec)
    assert torch.equal(solution.codes, to_codes(grouped(weight, spec), grid).reshape(weight.shape))
    assert torch.equal(solution.grid.scale, grid.scale) and solution.grid.scale.shape == grid.scale.shape
    assert spec.symmetric or torch.equal(solution.grid.zero_point, grid.zero_point)
    assert solution.loss == solution.rtn_loss > 0 and not solution.fallback


@settings(max_examples=80)
@given(
    st.integers(1, 8),
    st.sampled_from([8, 16, 40]),
    st.integers(1, 60),
    st.integers(0, 2**31),
    st.sampled_from(SPECS),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 7), max_size=5),
    st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_no_row_loses_more_than_with_rounding_to_nearest(
    rows, columns, tokens, seed, spec, act_order, static_groups, dead, size
):
    weight, x = problem(rows, columns, tokens, seed)
    x = x * size
    x[:, dead] = 0
    solution = solve(weight, hessian_of(x), spec, GptqOptions(act_order=act_order, static_groups=static_groups))
    mine, rtn = (output_errors(weight, q, x) for q in (values_of(solution, spec), nearest(weight, spec)))
    # float32 compares the two to its own precision, relative to what the unrounded weight gives.
    slack = 1e-6 * (weight.double() @ x.double().t()).square().mean(1)
    assert (mine <= rtn + slack).all()
    assert solution.loss <= solution.rtn_loss
    assert solution.loss == pytest.approx(float(mine.mean()), rel=1e-3, abs=float(slack.mean()))


@pytest.mark.parametrize("spec", SPECS[:4], ids=name_of)
def test_it_is_much_better_than_rounding_to_nearest_on_correlated_inputs(spec):
    weight, x = problem(64, 64, 1000)
    solution = solve(weight, hessian_of(x), spec, GptqOptions())
    assert solution.loss < 0.6 * solution.rtn_loss


@pytest.mark.parametrize("static_groups", [True, False])
@every_spec
def test_the_block_changes_nothing_but_the_time(spec, static_groups):
    weight, x = problem(16, 64, 500, seed=3)
    solutions = [
        solve(weight, hessian_of(x), spec, GptqOptions(block=b, static_groups=static_groups)) for b in (1, 7, 64, 1000)
    ]
    for other in solutions[1:]:
        same_rows = (solutions[0].codes == other.codes).all(1).sum()
        # The order of float32 sums may turn a tie, and with it all that follows in the row.
        assert same_rows >= 15
        assert other.loss == pytest.approx(solutions[0].loss, rel=0.02)


@every_spec
def test_scaling_the_weight_by_a_power_of_two_scales_the_result_exactly(spec):
    weight, x = problem()
    for power in (-12, 9):
        plain, scaled = (solve(w, hessian_of(x), spec, GptqOptions()) for w in (weight, weight * 2.0**power))
        assert torch.equal(plain.codes, scaled.codes)
        assert torch.equal(plain.grid.scale * 2.0**power, scaled.grid.scale)


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_the_size_of_the_hessian_does_not_change_the_codes(power):
    weight, x = problem()
    plain, scaled = (solve(weight, hessian_of(x) * 2.0**p, SPECS[0], GptqOptions()) for p in (0, power))
    assert torch.equal(plain.codes, scaled.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
def test_clusters_that_are_the_groups_give_the_groups_codes(symmetric, static_groups):
    weight, x = problem()
    options = GptqOptions(static_groups=static_groups)
    groups = solve(weight, hessian_of(x), QuantSpec(4, granularity="group", group_size=8, symmetric=symmetric), options)
    clusters = QuantSpec(4, granularity="cluster", symmetric=symmetric)
    labels = torch.arange(32) // 8
    solution = solve(weight, hessian_of(x), clusters, options, labels)
    assert torch.equal(solution.codes, groups.codes)
    assert torch.equal(solution.grid.scale, groups.grid.scale[..., 0])
    module = QuantLinear(weight, None, clusters, grid=solution.grid, codes=solution.codes, labels=labels)
    error = (weight - module.weight).double()
    assert solution.loss == pytest.approx(float((error @ x.double().t()).square().mean()), rel=1e-3)


@pytest.mark.parametrize("static_groups", [True, False])
def test_scattered_clusters_give_what_reordered_columns_give(static_groups):
    weight, x = problem()
    hessian, options = hessian_of(x), GptqOptions(static_groups=static_groups)
    spec = QuantSpec(4, granularity="cluster", symmetric=False)
    labels = torch.randint(5, (32,), generator=torch.Generator().manual_seed(1))
    order = labels.argsort(stable=True)
    scattered = solve(weight, hessian, spec, options, labels)
    together = solve(weight[:, order], hessian[order][:, order], spec, options, labels[order])
    assert torch.equal(scattered.codes[:, order], together.codes)
    assert torch.equal(scattered.grid.scale, together.grid.scale)


def test_columns_that_no_token_used_become_zero_and_disturb_nothing():
    weight, x = problem()
    x[:, [3, 17]] = 0
    alive = [j for j in range(32) if j not in (3, 17)]
    spec = QuantSpec(bits=4)
    solution = solve(weight, hessian_of(x), spec, GptqOptions())
    values = values_of(solution, spec)
    assert (values[:, [3, 17]] == 0).all() and (values[:, alive] != 0).any()
    weight[:, [3, 17]] = 0
    other = values_of(solve(weight, hessian_of(x), spec, GptqOptions()), spec)
    same_grid = weight_grid(weight, spec).scale[:, 0] == solution.grid.scale[:, 0]
    assert same_grid.sum() > 6 and torch.equal(values[same_grid], other[same_grid])


@every_spec
def test_an_all_zero_weight_stays_zero(spec):
    _, x = problem()
    solution = solve(torch.zeros(4, 32), hessian_of(x), spec, GptqOptions())
    assert (values_of(solution, spec) == 0).all() and solution.loss == 0


@every_spec
def test_one_token_is_enough_to_solve_for(spec):
    weight, x = problem(tokens=1)
    solution = solve(weight, hessian_of(x), spec, GptqOptions())
    assert not solution.fallback and solution.damping == 0.01
    assert solution.loss < 0.2 * solution.rtn_loss


def test_an_all_zero_hessian_leaves_rounding_to_nearest_and_says_so():
    weight, _ = problem()
    solution = solve(weight, Hessian(32).matrix, SPECS[0], GptqOptions())
    assert solution.fallback and solution.loss == 0
    assert torch.equal(values_of(solution, SPECS[0]), nearest(weight, SPECS[0]))


def test_damping_rises_until_cholesky_succeeds_and_the_weight_is_rounded_to_nearest_when_it_never_does():
    weight = torch.tensor([[0.3, -1.0], [1.0, 0.2]])
    slightly, hopelessly = (torch.tensor([[1.0, c], [c, 1.0]]) for c in (1.05, 100.0))
    solution = solve(weight, slightly, SPECS[0], GptqOptions())
    assert solution.damping == pytest.approx(0.1) and not solution.fallback
    solution = solve(weight, hopelessly, SPECS[0], GptqOptions())
    assert solution.fallback and solution.rtn_rows == 2
    assert torch.equal(values_of(solution, SPECS[0]), nearest(weight, SPECS[0]))


def test_what_cannot_be_solved_is_refused_by_name():
    weight, x = problem()
    hessian, spec, options = hessian_of(x), SPECS[0], GptqOptions()
    for value in (torch.nan, torch.inf):
        broken_weight, broken_hessian = weight.clone(), hessian.clone()
        broken_weight[1, 2], broken_hessian[2, 1] = value, value
        with pytest.raises(ValueError, match="weight: holds NaN or inf"):
            solve(broken_weight, hessian, spec, options)
        with pytest.raises(ValueError, match="hessian: holds NaN or inf"):
            solve(weight, broken_hessian, spec, options)
    with pytest.raises(ValueError, match=r"hessian: shape \(32, 32\) does not fit a weight \(12, 31\)"):
        solve(weight[:, :31], hessian, spec, options)
    with pytest.raises(ValueError, match="group_size: 5 does not divide"):
        solve(weight, hessian, QuantSpec(granularity="group", group_size=5), options)
    clusters = QuantSpec(granularity="cluster")
    for labels in (None, torch.zeros(31, dtype=torch.int64), torch.full((32,), 1), torch.full((32,), -1)):
        with pytest.raises(ValueError, match="labels: "):
            solve(weight, hessian, clusters, options, labels)


@pytest.mark.parametrize(
    ("field", "value", "close"),
    [
        ("damping", 0.0, "use 0.01"),
        ("damping", 2.0, "use 1"),
        ("damping", float("nan"), "use 0.01"),
        ("block", 0, "use 1"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_the_nearest_choice(field, value, close):
    with pytest.raises(ValueError, match=f"{field}: .*{close}"):
        GptqOptions(**{field: value})


@settings(max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([3, 40, 300]))
def test_the_hessian_is_the_same_for_any_split_of_the_tokens(lengths, channels):
    x = torch.randn(1, sum(lengths) + 1, channels, generator=torch.Generator().manual_seed(channels))
    split, last = Hessian(channels), 0
    for length in [*lengths, 1]:
        split.update(x[:, last : last + length])
        last += length
    flat = x[0].numpy().astype(np.float64)
    expected = 2 * flat.T @ flat / len(flat)
    assert split.count == len(flat)
    np.testing.assert_allclose(split.matrix.numpy(), expected, atol=1e-5 * np.abs(expected).max())
    assert torch.equal(split.matrix, split.matrix.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_in_sixteen_bits_are_summed_in_float32(dtype):
    x = torch.full((5000, 4), 1.0078125, dtype=dtype)
    hessian = Hessian(4)
    hessian.update(x)
    assert hessian.matrix.dtype == torch.float32
    torch.testing.assert_close(hessian.matrix, torch.full((4, 4), 2 * 1.0078125**2), rtol=2e-4, atol=0)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="x: 5 channels, expected 4"):
        Hessian(4).update(torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_in_sixteen_bits_is_solved_in_float32(dtype):
    weight, x = problem()
    solution = solve(weight.to(dtype), hessian_of(x), SPECS[3], GptqOptions())
    same = solve(weight.to(dtype).float(), hessian_of(x), SPECS[3], GptqOptions())
    assert torch.equal(solution.codes, same.codes) and solution.codes.dtype == torch.uint8
    assert solution.grid.scale.dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_fitted_on_the_way_weighs_errors_as_one_fitted_first(symmetric):
    weight, x = problem(64, 32)
    spec = QuantSpec(bits=3, granularity="group", group_size=8, symmetric=symmetric, range="mse")
    first, later = (
        solve(weight, hessian_of(x), spec, GptqOptions(act_order=False, static_groups=s)) for s in (True, False)
    )
    # No error has been made yet when the first group's grid is fitted.
    assert torch.equal(first.grid.scale[:, 0], later.grid.scale[:, 0])
    assert not torch.equal(first.grid.scale[:, 1], later.grid.scale[:, 1])


@pytest.mark.parametrize("spec", SPECS[:4], ids=name_of)
def test_weights_solved_as_one_tall_weight_get_what_they_get_alone(spec):
    weight, x = problem(rows=15)
    hessian, options, rows = hessian_of(x), GptqOptions(), [4, 8, 3]
    together = solve(weight, hessian, spec, options)
    parts = zip(weight.split(rows), together.codes.split(rows), together.grid.split(rows), strict=True)
    for part, codes, grid in parts:
        alone = solve(part, hessian, spec, options)
        assert torch.equal(codes, alone.codes) and torch.equal(grid.scale, alone.grid.scale)
        assert (grid.zero_point is None) == spec.symmetric
        assert spec.symmetric or torch.equal(grid.zero_point, alone.grid.zero_point)


@pytest.mark.parametrize("size", [1, 127, 128, 300, 512])
def test_wide_hessians_that_are_inverted_by_halves_give_the_codes_of_a_float64_inverse(size):
    weight, x = problem(rows=3, columns=size, tokens=2 * size)
    hessian = hessian_of(x)
    options, spec = GptqOptions(act_order=False), QuantSpec(bits=4)
    solution = solve(weight, hessian, spec, options)
    damped = hessian.double() + options.damping * hessian.double().diagonal().mean() * torch.eye(size)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w, scale = weight.double().clone(), solution.grid.scale.double()
    codes = torch.empty_like(w)
    for j in range(size):
        codes[:, j] = (w[:, j : j + 1] / scale).round().clamp(-7, 7)[:, 0]
        error = (w[:, j] - codes[:, j] * scale[:, 0]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    assert solution.rtn_rows == 0 and torch.equal(solution.codes.double(), codes)
