"""LLM.int8(): the real int8 product is the simulation; outliers stay; edge shapes."""

import pytest
import torch

from quantize.codecs.llm_int8 import MIXED_INT8, WEIGHT, int8_product, llm_int8_linear
from quantize.modules.packed import LlmInt8Linear
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import spec_of
from tests.quantize.reference import normal, sqnr


def mixed(weight, bias=None, threshold=6.0):
    return LlmInt8Linear.from_weight(weight, bias, WEIGHT, spec_of("llm_int8", activation=True, threshold=threshold))


def with_outliers(*shape, columns=(3, 40), seed=0):
    x = normal(*shape, seed=seed)
    x[..., list(columns)] *= 30
    return x


@pytest.mark.parametrize("shape", [(7, 64), (2, 9, 64), (64,), (0, 64)])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 24)])
def test_the_int8_product_is_what_the_simulated_linear_computes(shape, bias):
    weight, x = normal(24, 64, seed=1), with_outliers(*shape)
    inputs = InputQuantizer(spec_of("llm_int8", activation=True))
    simulated = QuantLinear(weight, bias, WEIGHT, inputs)(x)
    real = mixed(weight, bias)
    y = real(x)
    assert y.shape == simulated.shape
    assert torch.allclose(y, simulated, atol=1e-4, rtol=1e-5)


def test_columns_with_an_outlier_in_any_token_stay_as_they_are_and_the_share_is_reported():
    x = with_outliers(5, 64)
    x[:, [3, 40]] = 0.5
    x[2, 3], x[4, 40] = 6.0, -6.5
    real = mixed(normal(24, 64))
    assert real.outlier_share is None
    real(x)
    assert real.outlier_share == 2 / 64
    parts = MIXED_INT8.quantize(x, spec_of("llm_int8", activation=True))
    assert parts["columns"].tolist() == [3, 40]
    rounded = MIXED_INT8.fake(x, spec_of("llm_int8", activation=True))
    assert torch.equal(rounded[:, [3, 40]], x[:, [3, 40]])
    assert not torch.equal(rounded, x)


def test_keeping_outliers_saves_the_error_that_plain_int8_makes():
    weight, x = normal(24, 64, seed=1), with_outliers(100, 64)
    exact = x @ weight.t()
    plain = mixed(weight, threshold=1e9)(x)
    assert sqnr(exact, mixed(weight)(x)) > sqnr(exact, plain) + 3


def test_without_outliers_it_is_the_outer_product_of_scales_times_int32_sums():
    weight, x = normal(24, 64, seed=1), normal(6, 64).clamp(-3, 3)
    real = mixed(weight)
    step = x.abs().amax(1, keepdim=True) / 127
    sums = (x / step).round().long() @ real.int8_codes().long().t()
    assert torch.allclose(real(x), sums * step * real.scale.t(), rtol=1e-6)
    assert real.outlier_share == 0


def test_all_columns_may_be_outliers_and_all_values_zero():
    weight = normal(24, 64, seed=1)
    real = mixed(weight)
    x = torch.full((3, 64), 100.0)
    assert torch.allclose(real(x), x @ real.dequantized().t(), rtol=1e-4, atol=1e-3)
    assert real.outlier_share == 1
    assert not real(torch.zeros(3, 64)).any()


def test_int8_sums_do_not_saturate():
    a = torch.full((2, 2048), 127, dtype=torch.int8)
    assert int8_product(a, -a).tolist() == [[-127 * 127 * 2048] * 2] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_type_of_the_input_and_stays_finite(dtype):
    weight = normal(24, 64, seed=1).to(dtype)
    real = mixed(weight, torch.ones(24, dtype=dtype)).to(dtype)
    assert (real.int8_codes().dtype, real.scale.dtype) == (torch.int8, torch.float32)
    y, share = llm_int8_linear(with_outliers(4, 64).to(dtype) * 1000, real.int8_codes(), real.scale, real.bias)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert share > 0
