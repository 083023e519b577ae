"""NF4 and FP4 against float64 references, with and without double quantization."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from quantize.codecs.base import stored_bytes
from quantize.codecs.codebook import FP4, NF4, NF4_LEVELS
from quantize.spec.quant_spec import spec_of
from tests.quantize.reference import nearest, normal, sqnr

E2M1 = [sign * v for sign in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
BOTH = pytest.mark.parametrize(("codec", "name", "levels"), [(NF4, "nf4", NF4_LEVELS), (FP4, "fp4", E2M1)])


def test_nf4_is_the_quantiles_of_a_normal_with_an_exact_zero():
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    assert np.allclose(levels / levels.max(), NF4_LEVELS, atol=1e-6)


@BOTH
def test_on_a_normal_the_error_is_that_of_a_float64_reference(codec, name, levels):
    x, spec = normal(256, 1024), spec_of(name)
    blocks = x.double().numpy().reshape(-1, 64)
    scale = np.abs(blocks).max(-1, keepdims=True) / max(levels)
    reference = sqnr(blocks, nearest(blocks / scale, levels) * scale)
    decoded = codec.decode(codec.encode(x, spec), spec, x.shape)
    assert abs(sqnr(x, decoded) - reference) < 0.05
    assert torch.equal(decoded, codec.fake(x, spec))


@BOTH
def test_double_quantization_stores_4_127_bits_a_weight_and_costs_little(codec, name, levels):
    x, plain, double = normal(1024, 1024), spec_of(name), spec_of(name, double_quant=True)
    stored = codec.encode(x, double)
    assert round(8 * stored_bytes(stored) / x.numel(), 3) == 4.127
    assert 8 * stored_bytes(codec.encode(x, plain)) / x.numel() == 4.5
    lost = sqnr(x, codec.fake(x, plain)) - sqnr(x, codec.decode(stored, double, x.shape))
    assert 0 <= lost < 0.05


def test_scales_that_do_not_fill_their_last_block_come_back():
    x, spec = normal(5, 64 * 77), spec_of("nf4", double_quant=True)
    stored = NF4.encode(x, spec)
    assert stored["scale"].shape == (5, 77)
    assert stored["scale_step"].shape == (2,)
    assert sqnr(x, NF4.decode(stored, spec, x.shape)) > 18
