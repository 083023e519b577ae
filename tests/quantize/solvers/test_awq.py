"""AWQ's scale: the formula, the search against replayed tokens, and never worse than no scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import fake_quantize, grouped
from quantize.grid.ranges import weight_grid
from quantize.solvers.awq import RATIOS, awq_scale, scale_of
from quantize.solvers.gptq import Hessian
from quantize.spec.quant_spec import QuantSpec

SPEC = QuantSpec(bits=3, granularity="group", group_size=8, symmetric=False)


def rtn(weight, hessian):
    return fake_quantize(grouped(weight, SPEC), weight_grid(weight, SPEC)).reshape(weight.shape)


def inputs(seed=0, tokens=300, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=generator) * torch.exp(spread * torch.randn(32, generator=generator))
    return x, [torch.randn(n, 32, generator=generator) for n in (6, 10)]


def hessian_of(x):
    hessian = Hessian(x.shape[1])
    hessian.update(x)
    return hessian.matrix


def test_the_scale_is_the_papers_formula():
    mean = torch.tensor([0.5, 2.0, 8.0, 0.01])
    for ratio in (0.0, 0.5, 0.95):
        power = mean.numpy().astype(np.float64) ** ratio
        expected = power / np.sqrt(power.max() * power.min())
        np.testing.assert_allclose(scale_of(mean, ratio).numpy(), expected, rtol=1e-5)
    assert torch.equal(scale_of(mean, 0.0), torch.ones(4))


def test_a_channel_that_no_token_used_is_left_alone():
    scale = scale_of(torch.tensor([0.0, 2.0, 8.0]), 0.5)
    assert scale[0] == 1 and torch.equal(scale[1:], scale_of(torch.tensor([2.0, 8.0]), 0.5))
    assert torch.equal(scale_of(torch.zeros(3), 0.5), torch.ones(3))


def test_the_errors_are_those_of_replaying_the_tokens_and_the_least_is_chosen():
    x, weights = inputs()
    found = awq_scale(x.abs().mean(0), weights, hessian_of(x), rtn)
    expected = []
    for ratio in RATIOS:
        s = scale_of(x.abs().mean(0), ratio)
        lost = sum(
            ((x / s).double() @ rtn(w * s, None).double().t() - x.double() @ w.double().t()).square().sum()
            for w in weights
        )
        expected.append(float(lost / sum((x.double() @ w.double().t()).square().sum() for w in weights)))  # fmt: skip
    np.testing.assert_allclose(found.errors, expected, rtol=2e-3)
    assert found.ratio == RATIOS[int(np.argmin(expected))] and 0 < found.ratio < 1
    assert torch.equal(found.scale, scale_of(x.abs().mean(0), found.ratio))
    assert min(found.errors) < 0.8 * found.errors[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_it_is_never_worse_than_no_scale(seed, tokens, dtype):
    x, weights = inputs(seed, tokens)
    found = awq_scale(x.abs().mean(0), [w.to(dtype) for w in weights], hessian_of(x), rtn)
    assert min(found.errors) <= found.errors[0] and found.scale.dtype == torch.float32
    assert torch.isfinite(found.scale).all() and (found.scale > 0).all()
    again = awq_scale(x.abs().mean(0), [w.to(dtype) for w in weights], hessian_of(x), rtn)
    assert torch.equal(found.scale, again.scale) and found.errors == again.errors


def test_a_solver_sees_the_hessian_of_the_scaled_inputs():
    x, weights = inputs(spread=0.5)
    seen = []

    def quantized(weight, hessian):
        seen.append(hessian)
        return weight

    found = awq_scale(x.abs().mean(0), weights[:1], hessian_of(x), quantized, (0.5,))
    torch.testing.assert_close(seen[0], hessian_of(x / found.scale), rtol=1e-3, atol=1e-3)
    assert found.errors[0] < 1e-10


def test_what_does_not_fit_is_refused():
    x, weights = inputs()
    with pytest.raises(ValueError, match="do not fit 31 channels"):
        awq_scale(torch.ones(31), weights, hessian_of(x), rtn)
    with pytest.raises(ValueError, match="expected one or more of each"):
        awq_scale(torch.ones(32), [], hessian_of(x), rtn)
    with pytest.raises(ValueError, match="NaN or inf"):
        awq_scale(torch.full((32,), torch.nan), weights, hessian_of(x), rtn)


def test_inputs_of_nothing_but_zeros_keep_the_weights():
    _, weights = inputs()
    found = awq_scale(torch.zeros(32), weights, torch.zeros(32, 32), rtn)
    assert torch.equal(found.scale, torch.ones(32)) and found.ratio == 0
