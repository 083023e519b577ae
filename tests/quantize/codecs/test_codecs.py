"""What holds for every format: error against a float64 reference, one definition, stored bits, limits, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.codecs.base import stored_bytes
from quantize.codecs.k_quants.codec import FORMS
from quantize.codecs.registry import codec_of
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.reference import nearest, normal, sqnr

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def float8_levels(exponent_bits, mantissa_bits, bias, greatest):
    """All finite values of an 8-bit float, from its definition."""
    fractions = np.arange(2**mantissa_bits) / 2**mantissa_bits
    normal_ = [2.0 ** (e - bias) * (1 + fractions) for e in range(1, 2**exponent_bits)]
    levels = np.concatenate([2.0 ** (1 - bias) * fractions, *normal_])
    levels = levels[levels <= greatest]
    return np.concatenate([-levels[::-1], levels])


E4M3 = float8_levels(4, 3, 7, 448)
E5M2 = float8_levels(5, 2, 15, 57344)
SIGNED_E2M1 = np.concatenate([-E2M1[::-1], E2M1])


def blocks(x, size):
    return x.double().numpy().reshape(-1, size)


def scaled(levels, size):
    def reference(x):
        b = blocks(x, size)
        scale = np.abs(b).max(-1, keepdims=True) / levels.max()
        return (nearest(b / scale, levels) * scale).reshape(x.shape)

    return reference


def microscaled(levels, emax):
    def reference(x):
        b = blocks(x, 32)
        scale = 2.0 ** (np.floor(np.log2(np.abs(b).max(-1, keepdims=True))) - emax)
        return (nearest(b / scale, levels) * scale).reshape(x.shape)

    return reference


def nvfp4(x):
    b = blocks(x, 16)
    tensor = np.abs(b).max() / (6 * 448)
    scale = nearest(np.abs(b).max(-1, keepdims=True) / 6 / tensor, E4M3)
    return (nearest(b / (scale * tensor), SIGNED_E2M1) * scale * tensor).reshape(x.shape)


def integer_levels(bits):
    return np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))


ROWS = 256
REFERENCES = {
    "fp8_e4m3": scaled(E4M3, ROWS),
    "fp8_e5m2": scaled(E5M2, ROWS),
    "mxfp4": microscaled(SIGNED_E2M1, 2),
    "mxfp8": microscaled(E4M3, 8),
    "mxfp8_e5m2": microscaled(E5M2, 15),
    "nvfp4": nvfp4,
    "q8_0": scaled(integer_levels(8), 64),
    "q8_0_gguf": scaled(integer_levels(8), 32),
    "int": scaled(integer_levels(8), ROWS),
}
BITS = {
    "int": 8.125, "fp8_e4m3": 8.125, "fp8_e5m2": 8.125, "mxfp4": 4.25, "mxfp8": 8.25, "mxfp8_e5m2": 8.25,
    "nvfp4": 4.5 + 32 / 2**16, "q8_0": 8.5, "q8_0_gguf": 8.5, "nf4": 4.5, "fp4": 4.5,
    "trellis": 2.125, "q4_k": 4.625, "q5_k": 5.625, "q6_k": 6.5625,
}  # fmt: skip
WEIGHTS = [name for name, form in formats().items() if form.weight]
INPUTS = [name for name, form in formats().items() if form.activation]


@pytest.mark.parametrize("name", REFERENCES)
def test_on_a_normal_the_error_is_that_of_a_float64_reference(name):
    x, spec = normal(256, ROWS), spec_of(name)
    decoded = codec_of(spec).decode(codec_of(spec).encode(x, spec), spec, x.shape)
    assert abs(sqnr(x, decoded) - sqnr(x, REFERENCES[name](x))) < 0.05


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_every_width_have_the_error_of_a_float64_reference_and_are_stored_packed(bits, symmetric):
    x = normal(256, ROWS)
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    b = blocks(x, ROWS)
    if symmetric:
        expected = scaled(integer_levels(bits), ROWS)(x)
    else:
        low, high = np.minimum(b.min(-1, keepdims=True), 0), np.maximum(b.max(-1, keepdims=True), 0)
        step = (high - low) / (2**bits - 1)
        zero = np.round(-low / step)
        expected = (np.clip(np.round(b / step) + zero, 0, 2**bits - 1) - zero) * step
    stored = codec_of(spec).encode(x, spec)
    decoded = codec_of(spec).decode(stored, spec, x.shape)
    assert abs(sqnr(x, decoded) - sqnr(x, expected)) < 0.05
    linear = QuantLinear(x, None, spec)
    assert torch.equal(decoded, linear.weight)
    assert (
        stored_bytes(stored) == linear.stored_bytes() == 256 * ROWS * bits // 8 + 1024 + (0 if symmetric else 32 * bits)
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_stored_weight_has_its_bits_and_is_what_the_simulation_multiplies_by(name):
    x, spec = normal(256, 256, seed=1), spec_of(name)
    stored = codec_of(spec).encode(x, spec)
    linear = QuantLinear(x, None, spec)
    assert 8 * stored_bytes(stored) / x.numel() == BITS[name]
    assert linear.bits_per_weight() == BITS[name]
    assert torch.equal(linear.weight, codec_of(spec).decode(stored, spec, x.shape))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_blocks_stay_zero_and_tiny_and_huge_values_stay_finite(name, dtype):
    spec = spec_of(name, double_quant=formats()[name].double_quant)
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.tiny, limits.smallest_normal * limits.eps):
        x = normal(4, 128, dtype=dtype)
        x[0] = 0
        x[1, :64] = value
        x[2] *= value / 8
        decoded = codec_of(spec).decode(codec_of(spec).encode(x, spec), spec, x.shape, dtype)
        assert decoded.dtype == dtype
        assert torch.isfinite(decoded).all()
        assert not decoded[0].any()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((2, 128), torch.nan), "the weight holds NaN or inf"),
        (torch.full((2, 128), torch.inf), "the weight holds NaN or inf"),
        (
            torch.ones(2, 128, dtype=torch.int8),
            "the weight is torch.int8: only a floating-point tensor can be quantized",
        ),
        (torch.ones(2, 128, device="meta"), "the weight is on the meta device: it has no values to quantize"),
    ],
    ids=["nan", "inf", "integer", "meta"],
)
def test_a_weight_without_usable_values_is_refused(name, weight, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        codec_of(spec_of(name)).encode(weight, spec_of(name))


@pytest.mark.parametrize("name", [name for name in WEIGHTS if formats()[name].granularities == ("group",)])
def test_a_group_that_does_not_divide_is_refused(name):
    with pytest.raises(ValueError, match="does not divide"):
        codec_of(spec_of(name)).encode(normal(3, 120), spec_of(name))


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_quantizer_gives_what_would_be_stored_of_its_input(name):
    x, spec = normal(2, 5, 128, seed=3), spec_of(name, activation=True)
    y = InputQuantizer(spec)(x)
    assert y.shape == x.shape
    assert sqnr(x, y) > 15
    if name != "int":
        codec = codec_of(spec)
        stored = [codec.decode(codec.encode(sample, spec), spec, sample.shape) for sample in x]
        assert torch.equal(y, torch.stack(stored))


@pytest.mark.parametrize("name", INPUTS)
def test_nan_in_an_activation_spreads_instead_of_being_hidden(name):
    x = normal(2, 128)
    x[0, 5] = torch.nan
    y = codec_of(spec_of(name)).fake(x, spec_of(name, activation=True))
    assert torch.isnan(y[0, 5])


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_saved_weight_comes_back_and_survives_half(name):
    x, spec = normal(64, 128, seed=5), spec_of(name, double_quant=formats()[name].double_quant)
    saved, other = QuantLinear(x, None, spec), QuantLinear(torch.zeros_like(x), None, spec)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.weight, saved.weight)
    before = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    saved.half().float()
    assert {key: t.dtype for key, t in saved.state_dict().items()} == {key: t.dtype for key, t in before.items()}
    assert all(torch.equal(t.float(), before[key].float()) for key, t in saved.state_dict().items())


@given(
    st.sampled_from([n for n in WEIGHTS if n not in {"int", "nvfp4", *FORMS}]),
    st.integers(-20, 20),
    st.integers(0, 999),
)
def test_scaling_by_a_power_of_two_scales_the_result_exactly(name, exponent, seed):
    x, spec = normal(2, 64, seed=seed), spec_of(name)
    if name == "q8_0_gguf":
        exponent = max(min(exponent, 8), 0)  # its fp16 scales are not exact below and above
    y = codec_of(spec).fake(x * 2.0**exponent, spec)
    assert torch.equal(y, codec_of(spec).fake(x, spec) * 2.0**exponent)
