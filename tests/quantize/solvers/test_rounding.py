"""Learned rounding and clipping: what is trained is what is stored, gradients against finite differences, and that it learns."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import dequantize, fake_quantize, grouped
from quantize.grid.ranges import weight_grid
from quantize.modules.simulated import QuantLinear
from quantize.solvers.rounding import LEAST, LearnedClipping, LearnedRounding, linear_decay, sign_step, warmed_cosine
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.solvers.problems import best_of_all, losses, problem

SPECS = [
    QuantSpec(bits=3),
    QuantSpec(bits=4, symmetric=False),
    QuantSpec(bits=2, granularity="group", group_size=8, symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=8),
    QuantSpec(bits=3, granularity="tensor", symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=8, symmetric=False, scales="float16_min"),
    QuantSpec(bits=3, granularity="cluster", symmetric=False),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
both = pytest.mark.parametrize("kind", [LearnedRounding, LearnedClipping])


def labels_of(spec):
    return torch.arange(32) % 3 if spec.granularity == "cluster" else None


def decoded(codes, grid, spec, labels):
    if labels is not None:
        return dequantize(codes, grid.of_channels(labels))
    return dequantize(grouped(codes, spec), grid).reshape(codes.shape)


def train(module, weight, hessian, steps=200):
    """Returns the best values met: sign steps do not descend monotonically, and the best are what a solver keeps."""
    best, least = None, float("inf")
    for step in range(steps):
        values = module()
        loss = ((weight - values) @ hessian * (weight - values)).sum()
        if float(loss.detach()) < least:
            best, least = values.detach(), float(loss.detach())
        loss.backward()
        sign_step(module.parameters(), linear_decay(step, steps))
        module.project()
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(0, 2**31), st.sampled_from(SPECS), st.sampled_from([LearnedRounding, LearnedClipping]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_what_is_stored_decodes_to_what_was_trained_bit_for_bit(rows, seed, spec, kind, dtype):
    weight, _ = problem(rows, 32, 10, seed)
    labels = labels_of(spec)
    module = kind(weight.to(dtype), spec, labels)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    module.project()
    codes, grid = module.final()
    plain = weight_grid(weight.float(), spec, labels)
    assert codes.dtype == (torch.int8 if spec.symmetric else torch.uint8) and grid.scale.shape == plain.scale.shape
    assert not grid.scale.requires_grad
    assert torch.equal(decoded(codes, grid, spec, labels), module())
    if grid.zero_point is not None:
        assert torch.equal(grid.zero_point, grid.zero_point.round().clamp(grid.low, grid.high))
    linear = QuantLinear(weight.to(dtype), None, spec, grid=grid, codes=codes, labels=labels)
    assert torch.equal(linear.weight.float(), module().to(linear.weight.dtype).float())


@every_spec
def test_learned_rounding_starts_as_rounding_to_nearest(spec):
    weight, _ = problem()
    labels = labels_of(spec)
    grid = weight_grid(weight, spec, labels)
    expected = decoded(
        (lambda g: ((weight if labels is not None else grouped(weight, spec)) / g.scale).round().add(0 if g.zero_point is None else g.zero_point).clamp(g.low, g.high).reshape(weight.shape))(grid if labels is None else grid.of_channels(labels)),
        grid, spec, labels,
    )  # fmt: skip
    torch.testing.assert_close(LearnedRounding(weight, spec, labels)(), expected, rtol=1e-5, atol=1e-6)


@both
def test_a_start_grid_takes_the_place_of_minmax(kind):
    weight, _ = problem()
    spec = QuantSpec(bits=3, symmetric=False)
    start = weight_grid(weight * 0.6, spec)
    module = kind(weight, spec, start=start)
    if kind is LearnedRounding:
        torch.testing.assert_close(module(), fake_quantize(weight, start), rtol=1e-5, atol=1e-6)
    low, high = module.ranges()
    assert (low.abs() <= (start.zero_point * start.scale).abs() + 1e-6).all() and high.max() < weight.max()


@every_spec
def test_training_lowers_the_loss_and_gives_the_same_bits_twice(spec):
    weight, hessian = problem(8, 32, 300)
    results = []
    for _ in range(2):
        module = LearnedRounding(weight, spec, labels_of(spec))
        before = losses(weight, module().detach(), hessian).sum()
        results.append(train(module, weight, hessian))
        assert losses(weight, results[-1], hessian).sum() < (0.85 if spec.bits < 4 else 1) * before
        assert module.rounding.abs().max() <= 0.5
        shares = torch.cat([module.low_share.flatten(), module.high_share.flatten()])
        assert shares.min() >= LEAST and shares.max() <= 1
    assert torch.equal(results[0], results[1])


def test_on_tiny_problems_learned_rounding_is_near_the_best_of_all_roundings():
    better = 0
    for seed in range(8):
        weight, hessian = problem(1, 3, 50, seed)
        spec = QuantSpec(bits=3)
        module = LearnedRounding(weight, spec)
        before = losses(weight, module().detach(), hessian)[0]
        best_found = before
        module.low_share.requires_grad_(False)
        module.high_share.requires_grad_(False)
        scale = module.grid().scale.detach()[0].expand(3)
        for step in range(60):
            d = weight - module()
            (d @ hessian * d).sum().backward()
            sign_step(module.parameters(), linear_decay(step, 60))
            module.project()
            best_found = min(best_found, losses(weight, module().detach(), hessian)[0])
        best = best_of_all(weight[0], scale, range(-3, 4), hessian)
        assert best_found >= best * (1 - 1e-5)
        better += best_found <= 1.3 * best + 1e-9
    assert better >= 6


def test_clipping_learns_to_clip_an_outlier_by_gradients():
    weight = torch.linspace(-1, 1, 256)[None].clone()
    weight[0, 5] = 3.0
    spec = QuantSpec(bits=2, symmetric=False)
    module = LearnedClipping(weight, spec)
    assert torch.sigmoid(module.high_logit).item() == pytest.approx(0.982, abs=1e-3)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    first = float((weight - module()).detach().square().sum())
    for _ in range(100):
        optimizer.zero_grad()
        (weight - module()).square().sum().backward()
        optimizer.step()
    assert float((weight - module()).detach().square().sum()) < 0.7 * first
    assert torch.sigmoid(module.high_logit).item() < 0.8


def test_gradients_of_scales_are_the_derivatives_where_no_code_changes():
    """Symmetric: with the codes held, a value is its code times the share times the plain scale."""
    weight, _ = problem(3, 8)
    spec = QuantSpec(bits=3)
    module = LearnedRounding(weight, spec)
    codes, grid = module.final()
    out = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    (module() * out).sum().backward()
    # d value / d scale = code - w / scale inside the range (straight through the rounding), code where it saturates.
    exact = weight / grid.scale
    inside = exact.abs() <= 3.5
    expected = ((codes - torch.where(inside, exact, torch.zeros_like(exact))) * grid.scale * out).sum(1, keepdim=True)
    total = module.low_share.grad + module.high_share.grad
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.rounding.grad, grid.scale * out, rtol=1e-5, atol=1e-6)


def test_saturated_weights_stop_gradients_of_their_rounding():
    weight = torch.tensor([[0.1, 0.2, 4.0, -4.0]])
    spec = QuantSpec(bits=3)
    module = LearnedRounding(weight, spec, start=weight_grid(torch.tensor([[1.0]]), spec))
    module().sum().backward()
    assert (module.rounding.grad[0, :2] > 0).all() and (module.rounding.grad[0, 2:] == 0).all()


def test_the_rate_decays_to_nothing_and_a_sign_step_moves_by_it():
    rates = [linear_decay(step, 200) for step in range(200)]
    assert rates[0] == 1 / 200 and rates[-1] == pytest.approx(1 / 200 / 200)
    assert all(a > b for a, b in itertools.pairwise(rates)) and 0.5 < sum(rates) < 0.51
    assert linear_decay(50, 100, 0.2) == pytest.approx(0.1)
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([5.0, -0.1, 0.0])
    sign_step([parameter], 0.25)
    assert parameter.tolist() == [-0.25, 0.25, 0.0] and parameter.grad is None


@both
def test_what_cannot_be_learned_is_refused_and_zeros_stay_zeros(kind):
    weight, _ = problem()
    with pytest.raises(ValueError, match="format: 'nf4' has no range to learn"):
        kind(weight, spec_of("nf4", group_size=8))
    with pytest.raises(ValueError, match="NaN or inf"):
        kind(weight * torch.nan, QuantSpec())
    for spec in SPECS[:4]:
        module = kind(torch.zeros(4, 32), spec)
        (module() - 1).square().sum().backward()
        assert (module() == 0).all()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@both
def test_it_moves_with_the_module_and_computes_where_it_is(kind):
    weight, _ = problem()
    module = kind(weight, SPECS[2])
    assert all(t.device == torch.device("cpu") for t in module().detach()[None])
    meta = module.to("meta")
    assert meta().device.type == "meta"


@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=3), QuantSpec(bits=3, granularity="group", group_size=8, symmetric=False)]
)
def test_a_learned_scale_multiplies_the_columns_before_they_are_rounded(spec):
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(6, 24, generator=generator), torch.rand(24, generator=generator) + 0.5
    plain = LearnedClipping(weight * scale, spec)
    learned = LearnedClipping(weight, spec, log_scale=torch.nn.Parameter(scale.log()))
    torch.testing.assert_close(learned(), plain(), rtol=1e-3, atol=1e-3)
    learned().square().sum().backward()
    assert bool(learned.log_scale.grad.abs().sum() > 0)
    with pytest.raises(ValueError, match="log_scale, start"):
        LearnedClipping(weight, spec, None, plain.grid(), learned.log_scale)


@pytest.mark.parametrize("steps", [1, 7, 128])
def test_the_rate_rises_over_the_first_eighth_and_falls_after_that(steps):
    rates = [warmed_cosine(step, steps, 0.5) for step in range(steps)]
    top = rates.index(max(rates))
    assert min(rates) > 0 and max(rates) <= 0.5 and top <= steps / 8 + 1
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.1 * max(rates) or steps < 10
