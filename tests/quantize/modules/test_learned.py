"""Tuned Linears: what they start from, what they give is what is stored, and derivatives against autograd of the plain formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from quantize.modules.learned import TunedGain, TunedInput, TunedLinear, product_in
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import QuantSpec

SPECS = [
    QuantSpec(bits=3),
    QuantSpec(bits=8, symmetric=False),
    QuantSpec(bits=4, granularity="tensor"),
    QuantSpec(bits=2, granularity="group", group_size=8, symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=8, scales="float16"),
    QuantSpec(bits=4, granularity="group", group_size=8, symmetric=False, scales="float16_min"),
    QuantSpec(bits=3, granularity="cluster", symmetric=False),
    QuantSpec(bits=2, format="trellis"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
INPUT = QuantSpec(bits=4, granularity="token", dynamic=True)


def made(spec, seed=0, inputs=None, rows=6, columns=32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    labels = torch.arange(columns) % 3 if spec.granularity == "cluster" else None
    return QuantLinear(weight, torch.randn(rows, generator=generator), spec, inputs, labels=labels)


@every_spec
@given(seed=st.integers(0, 999), rounded=st.booleans())
@settings(max_examples=15, deadline=None)
def test_it_starts_as_what_it_stands_for(spec, seed, rounded):
    quantized = made(spec, seed, InputQuantizer(INPUT) if rounded else None)
    tuned, x = TunedLinear(quantized), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(tuned.scale(), quantized.scale)
    assert torch.equal(tuned.weight(), quantized.weight)
    torch.testing.assert_close(tuned(x), quantized(x), rtol=1e-5, atol=1e-5)


@every_spec
@given(seed=st.integers(0, 999), size=st.floats(0.01, 0.5))
@settings(max_examples=15, deadline=None)
def test_what_was_learned_is_what_is_stored_and_codes_stay(spec, seed, size):
    quantized = made(spec, seed)
    codes, tuned = quantized.codes.clone(), TunedLinear(quantized)
    with torch.no_grad():
        tuned.log_ratio.normal_(0, size, generator=torch.Generator().manual_seed(seed))
        wanted, scale = tuned.weight(), tuned.scale()
    quantized.rescale(scale)
    assert torch.equal(quantized.codes, codes) and torch.equal(quantized.scale, scale)
    torch.testing.assert_close(quantized.weight, wanted, rtol=1e-6, atol=1e-7)
    if spec.scales != "float32":
        assert torch.equal(scale, scale.half().float())


@every_spec
def test_gradients_by_scales_and_inputs_are_those_of_the_plain_formula(spec):
    quantized = made(spec)
    tuned, x = TunedLinear(quantized), torch.randn(7, 32, requires_grad=True)
    by_output = torch.randn(7, 6)
    found = torch.autograd.grad(tuned(x), (tuned.log_ratio, x), by_output)
    # d weight / d log ratio is the weight itself: each weight's part belongs to its scale.
    parts = (by_output.t() @ x.detach()) * quantized.weight
    if spec.granularity == "cluster":
        parts = torch.stack([parts[:, torch.arange(32) % 3 == k].sum(1) for k in range(3)], 1)
    elif spec.granularity == "group":
        parts = parts.reshape(6, 4, 8).sum(-1)
    else:
        parts = parts.sum() if spec.granularity == "tensor" else parts.sum(1)
    torch.testing.assert_close(found[0], parts.reshape(found[0].shape), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], by_output @ quantized.weight, rtol=1e-4, atol=1e-4)


def test_gradients_pass_straight_through_the_rounding_of_the_input():
    quantized, x = made(QuantSpec(bits=4), inputs=InputQuantizer(INPUT)), torch.randn(3, 32, requires_grad=True)
    (found,) = torch.autograd.grad(TunedLinear(quantized)(x).sum(), x)
    torch.testing.assert_close(found, quantized.weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


STATIC = [
    QuantSpec(bits=4, granularity="tensor"),
    QuantSpec(bits=3, granularity="tensor", symmetric=False),
    QuantSpec(bits=4, granularity="cluster", symmetric=False),
]
every_static = pytest.mark.parametrize("spec", STATIC, ids=str)


def static(spec, columns=32):
    """A quantizer of what lies within 1.5 standard deviations, so that something is clipped."""
    labels = torch.arange(columns) % 3 if spec.granularity == "cluster" else None
    ends = torch.linspace(1, 1.5, columns)
    return InputQuantizer(spec, (-ends, ends), labels)


@every_static
@given(seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_a_tuned_input_starts_with_the_bits_of_its_quantizer_and_ends_with_those_of_the_rescaled_one(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer, x = static(spec), torch.randn(4, 7, 32, generator=generator)
    tuned = TunedInput(quantizer)
    assert torch.equal(tuned(x), quantizer(x))
    with torch.no_grad():
        tuned.log_ratio.normal_(0, 0.3, generator=generator)
    linears = [QuantLinear(torch.randn(3, 32), None, QuantSpec(bits=4), quantizer) for _ in range(2)]
    linears[0].rescale_input(tuned.scale().detach())
    assert torch.equal(tuned(x), linears[1].inputs(x))


@every_static
def test_the_derivative_by_an_input_scale_is_that_of_learned_step_sizes(spec):
    quantizer, x = static(spec), torch.randn(50, 32, requires_grad=True)
    tuned, by_output = TunedInput(quantizer), torch.randn(50, 32)
    by_scale, by_input = torch.autograd.grad(tuned(x), (tuned.log_ratio, x), by_output)
    grid, low, high = quantizer.grid, *quantizer.limits
    grid = grid if quantizer.labels is None else grid.of_channels(quantizer.labels)
    zero = 0 if grid.zero_point is None else grid.zero_point
    steps = x.detach() / grid.scale
    codes = steps.round() + zero
    within = (codes >= low) & (codes <= high)
    # By the logarithm of the scale: the scale times equation 3.
    parts = by_output * grid.scale * torch.where(within, steps.round() - steps, codes.clamp(low, high) - zero)
    assert 0.01 < float(within.float().mean()) < 0.99
    torch.testing.assert_close(by_input, by_output * within)
    if quantizer.labels is None:
        wanted = parts.sum()
    else:
        wanted = torch.stack([parts[:, quantizer.labels == k].sum() for k in range(3)])
    torch.testing.assert_close(by_scale.flatten(), wanted.flatten(), rtol=1e-4, atol=1e-4)


def test_inputs_without_static_integer_scales_are_not_tuned_and_no_wrong_scale_is_taken():
    with pytest.raises(ValueError, match="static scales"):
        TunedInput(InputQuantizer(INPUT))
    for scale in (torch.ones(3), torch.full_like(static(STATIC[0]).scale, torch.inf)):
        with pytest.raises(ValueError, match="scale"):
            static(STATIC[0]).rescale(scale)
    with pytest.raises(ValueError, match="not quantized"):
        made(QuantSpec(bits=4)).rescale_input(torch.ones(()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("rows", [4, 1500], ids=["torch's product", "oneDNN's"])
def test_a_product_in_another_type_has_the_derivatives_of_a_linear(dtype, tolerance, rows):
    x, weight = torch.randn(2, 16, 48, requires_grad=True), torch.randn(rows, 48, requires_grad=True)
    bias, by_output = torch.randn(rows), torch.randn(2, 16, rows)
    y, plain = product_in(dtype, x, weight, bias), functional.linear(x, weight, bias)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain, rtol=tolerance, atol=20 * tolerance)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, weight), by_output), torch.autograd.grad(plain, (x, weight), by_output), strict=True
    ):
        assert float((found - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_gain_is_multiplied_and_not_what_is_added_to_it(offset):
    gain = TunedGain(weight := torch.tensor([0.5, -0.2]), offset)
    assert torch.equal(gain(weight), weight)
    with torch.no_grad():
        gain.log_ratio.copy_(torch.tensor([2.0, 0.5]).log())
    torch.testing.assert_close(gain(weight) + offset, (weight + offset) * torch.tensor([2.0, 0.5]))


def test_what_has_no_scales_of_integers_is_refused():
    nf4 = QuantLinear(torch.randn(4, 64), None, QuantSpec(bits=4, format="nf4", granularity="group", group_size=64))
    with pytest.raises(ValueError, match="format: nf4 has no scales"):
        TunedLinear(nf4)
    with pytest.raises(ValueError, match="format: floating point"):
        TunedLinear(QuantLinear(torch.randn(4, 64), None, None))
    corrected = made(QuantSpec(bits=4))
    corrected.correct(torch.zeros(6, 2), torch.zeros(2, 32))
    with pytest.raises(ValueError, match="low rank"):
        TunedLinear(corrected)
    with pytest.raises(ValueError, match="not the shape"):
        made(QuantSpec(bits=4)).rescale(torch.ones(3, 1))
    with pytest.raises(ValueError, match="NaN or inf"):
        made(QuantSpec(bits=4)).rescale(torch.full((6, 1), float("nan")))
