"""Range search: never worse than minmax on its own measure, and against a search in numpy that tries every range."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import fake_quantize, grouped
from quantize.grid.ranges import weight_grid
from quantize.modules.simulated import fake_quantize_dynamic
from quantize.solvers.clip import (
    SHRINKS,
    clipped_grid,
    clipped_levels,
    input_clip_ratio,
)
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.solvers.problems import losses, problem

SPECS = [
    QuantSpec(bits=3),
    QuantSpec(bits=4, symmetric=False),
    QuantSpec(bits=2, granularity="group", group_size=8, symmetric=False),
    QuantSpec(bits=3, granularity="group", group_size=8),
    QuantSpec(bits=3, granularity="tensor", symmetric=False),
    QuantSpec(bits=4, granularity="tensor"),
    QuantSpec(bits=4, symmetric=False, scales="float16_min"),
    QuantSpec(bits=3, granularity="cluster", symmetric=False),
]


def clusters(spec):
    return torch.arange(24) % 3 if spec.granularity == "cluster" else None


def rounded(weight, spec, grid, labels):
    if labels is not None:
        return fake_quantize(weight, grid.of_channels(labels))
    return fake_quantize(grouped(weight, spec), grid).reshape(weight.shape)


def measure(weight, values, spec, weighing, labels):
    """What the search minimises, of every scale of its own, in float64: (rows, groups), or one number for a tensor."""
    columns = labels if labels is not None else torch.arange(24) // (spec.group_size or 24)
    whole = torch.diag(weighing) if weighing.ndim == 1 else weighing
    parts = []
    for k in range(int(columns.max()) + 1):
        m = columns == k
        parts.append(losses(weight[:, m], values[:, m], whole[m][:, m]))
    found = np.stack(parts, axis=1)
    return found.sum() if spec.granularity == "tensor" else found


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 60),
    st.integers(0, 2**31),
    st.sampled_from(SPECS),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_it_is_never_worse_than_minmax_on_its_own_measure(rows, tokens, seed, spec, whole, dtype):
    weight, hessian = problem(rows, 24, tokens, seed)
    weight, labels = weight.to(dtype), clusters(spec)
    weighing = hessian if whole else hessian.diagonal()
    grid, plain = clipped_grid(weight, spec, weighing, labels), weight_grid(weight, spec, labels)
    assert grid.scale.shape == plain.scale.shape and (grid.low, grid.high) == (plain.low, plain.high)
    assert (grid.zero_point is None) == spec.symmetric
    found, before = (
        measure(weight.float(), rounded(weight.float(), spec, g, labels), spec, weighing, labels) for g in (grid, plain)
    )
    assert (found <= before * (1 + 1e-4) + 1e-5 * before.sum()).all()


@pytest.mark.parametrize("whole", [True, False])
def test_a_symmetric_search_finds_the_best_shrunk_range_of_each_row(whole):
    weight, hessian = problem(6, 24)
    spec = QuantSpec(bits=3)
    weighing = hessian if whole else hessian.diagonal()
    grid = clipped_grid(weight, spec, weighing)
    h = (hessian if whole else torch.diag(hessian.diagonal())).double().numpy()
    for row, scale in zip(weight.double().numpy(), grid.scale[:, 0].tolist(), strict=True):
        errors = []
        for shrink in SHRINKS:
            s = np.float64(np.float32(np.abs(row).max() * shrink) / np.float32(3))
            d = row - np.clip(np.round(row / s), -3, 3) * s
            errors.append(d @ h @ d)
        best = SHRINKS[int(np.argmin(errors))]
        assert scale == pytest.approx(np.abs(row).max() * best / 3, rel=1e-5)


def ramp():
    """-1 to 1 evenly, and one column of 3."""
    weight = torch.linspace(-1, 1, 256)[None].clone()
    weight[0, 5] = 3.0
    return weight


def test_with_an_outlier_it_clips_and_where_that_column_matters_it_does_not():
    spec, even = QuantSpec(bits=3), torch.ones(256)
    plain = weight_grid(ramp(), spec).scale
    assert clipped_grid(ramp(), spec, even).scale < 0.6 * plain
    even[5] = 1e4
    assert clipped_grid(ramp(), spec, even).scale > 0.95 * plain


def test_an_asymmetric_search_moves_the_two_ends_apart():
    spec = QuantSpec(bits=2, symmetric=False)
    plain, grid = weight_grid(ramp(), spec), clipped_grid(ramp(), spec, torch.ones(256))
    low, high = -grid.zero_point * grid.scale, (3 - grid.zero_point) * grid.scale
    assert -1.1 < low < -0.4 and high < 1.7
    assert grid.scale < 0.7 * plain.scale and -low / high > 1.3 / 3


def test_the_size_of_the_weighing_changes_nothing_and_the_result_is_the_same_twice():
    weight, hessian = problem(6, 24)
    for weighing in (hessian, hessian.diagonal()):
        scales = [clipped_grid(weight, SPECS[2], weighing * 2.0**p).scale for p in (0, 0, 90, -90)]
        assert all(torch.equal(scales[0], s) for s in scales[1:])


def test_an_all_zero_weighing_or_weight_keeps_minmax():
    weight, _ = problem(6, 24)
    for spec in SPECS[:4]:
        grid, plain = clipped_grid(weight, spec, torch.zeros(24)), weight_grid(weight, spec)
        assert torch.allclose(grid.scale, plain.scale)
        assert (
            rounded(torch.zeros(6, 24), spec, clipped_grid(torch.zeros(6, 24), spec, torch.ones(24)), None) == 0
        ).all()


def test_a_weighing_that_does_not_fit_is_refused():
    weight, hessian = problem(6, 24)
    with pytest.raises(ValueError, match=r"weighing: shape \(23,\) is not \(24,\) or \(24, 24\)"):
        clipped_grid(weight, SPECS[0], torch.ones(23))
    with pytest.raises(ValueError, match="weighing: shape"):
        clipped_levels(weight, spec_of("fp8_e4m3"), hessian[:5])


@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4", "nvfp4", "fp8_e4m3"])
@pytest.mark.parametrize("whole", [True, False])
def test_scales_of_other_formats_are_never_worse_than_their_own_rule(name, whole):
    weight, hessian = problem(16, 64, 300)
    spec, weighing = spec_of(name), hessian if whole else hessian.diagonal()
    group = spec.group_size or 64
    found = []
    for w in (weighing, None):
        levels = clipped_levels(weight, spec, w)
        steps = torch.empty(64, 16)
        for j in range(64):
            levels.round(j // group, weight[:, j].contiguous(), steps[j])
        values = (steps * levels.scale[torch.arange(64) // group]).t()
        square = hessian if whole else torch.diag(hessian.diagonal())
        blocks = [slice(i, i + group) for i in range(0, 64, group)]
        found.append(np.stack([losses(weight[:, b], values[:, b], square[b, b]) for b in blocks], axis=1))
    assert (found[0] <= found[1] * (1 + 1e-5)).all() and (found[0] < found[1]).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [{"granularity": "token"}, {"granularity": "group", "group_size": 8}])
def test_an_input_clip_ratio_has_the_least_output_error_of_all(symmetric, granularity):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=generator)
    weights = [torch.randn(n, 64, generator=generator) for n in (5, 9)]
    spec = QuantSpec(bits=3, symmetric=symmetric, dynamic=True, **granularity)
    ratio, errors = input_clip_ratio(weights, x, lambda t, r: fake_quantize_dynamic(t, replace(spec, clip=r)))
    both = torch.cat(weights).double()
    ratios = [1 - 0.05 * i for i in range(11)]
    expected = [
        float(((x - fake_quantize_dynamic(x, replace(spec, clip=r))).double() @ both.t()).square().sum() / (x.double() @ both.t()).square().sum())
        for r in ratios
    ]  # fmt: skip
    np.testing.assert_allclose(errors, expected, rtol=1e-3)
    assert ratio == pytest.approx(ratios[int(np.argmin(expected))]) and min(errors) <= errors[0]
    assert ratio < 1 or spec.granularity == "group"


def test_ratios_behind_one_that_is_much_dearer_are_not_tried_and_the_best_is_the_same():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    weights = [torch.randn(7, 64, generator=torch.Generator().manual_seed(2))]
    for bits in (3, 4, 8):
        spec = QuantSpec(bits=bits, symmetric=False, dynamic=True, granularity="token")

        def fake(t, ratio, spec=spec):
            return fake_quantize_dynamic(t, replace(spec, clip=ratio))

        ratio, errors = input_clip_ratio(weights, x, fake, dearer=1.25)
        whole = input_clip_ratio(weights, x, fake)
        assert ratio == whole[0] and errors == whole[1][: len(errors)]
        assert len(errors) < len(whole[1]) and errors[-1] > 1.25 * min(errors)


def test_an_input_without_readers_is_refused():
    with pytest.raises(ValueError, match="weights: expected one"):
        input_clip_ratio([], torch.ones(3, 4), lambda x, r: x)
