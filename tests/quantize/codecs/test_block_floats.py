"""E2M1, E8M0, MX and NVFP4 against their definitions and against gguf and compressed-tensors."""

import itertools
import math

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantize.codecs.e2m1 import e2m1_codes, e2m1_values, round_e2m1
from quantize.codecs.fp8 import to_float8
from quantize.codecs.mx import e8m0_scale, e8m0_values
from quantize.codecs.nvfp4 import with_tensor_scale
from quantize.codecs.packing import unpack
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import spec_of
from tests.quantize.reference import normal

LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e2m1_codes_are_sign_exponent_mantissa_and_ties_go_to_the_even_mantissa():
    assert e2m1_values(torch.arange(8, dtype=torch.uint8)).tolist() == LEVELS
    assert e2m1_values(torch.arange(8, 16, dtype=torch.uint8)).tolist() == [-v for v in LEVELS]
    assert e2m1_codes(torch.tensor(LEVELS)).tolist() == list(range(8))
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(LEVELS)])
    assert e2m1_codes(middles).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert e2m1_codes(torch.tensor([-7.0, -torch.inf, torch.inf])).tolist() == [15, 15, 7]


def test_codes_and_rounding_of_e2m1_agree():
    x = torch.linspace(-7, 7, 4001)
    assert torch.equal(e2m1_values(e2m1_codes(x)), round_e2m1(x) + 0.0)


def test_a_shared_scale_is_the_power_of_two_below_the_greatest_magnitude_over_the_elements_greatest():
    greatest = torch.tensor([6.0, 4.0, 3.999, 1.0, 0.0, 2.0**-149, torch.finfo(torch.float32).max, torch.inf])
    scale = e8m0_scale(greatest, 2)
    assert scale.tolist() == [127, 127, 126, 125, 0, 0, 252, 255]
    assert e8m0_values(scale[:-1]).double().log2().tolist() == [0, 0, -1, -2, -127, -127, 125]
    assert torch.isnan(e8m0_values(scale[-1:])).all()


def test_every_float8_is_what_torch_rounds_to_but_saturates():
    x = torch.tensor([0.0, 447.0, 448.0, 460.0, 1e9, -1e9])
    assert to_float8(x, torch.float8_e4m3fn).float().tolist() == [0, 448, 448, 448, 448, -448]
    assert to_float8(x[-2:], torch.float8_e5m2).float().tolist() == [57344, -57344]


@pytest.mark.parametrize("seed", range(3))
def test_mxfp4_has_the_scales_and_values_of_gguf(seed):
    x, spec = normal(8, 128, seed=seed) * 10.0 ** (seed - 1), spec_of("mxfp4")
    packed = gguf_quantize(x.numpy(), GGMLQuantizationType.MXFP4)
    stored = codec_of(spec).encode(x, spec)
    assert np.array_equal(packed.reshape(-1, 17)[:, 0], stored["scale"].view(-1).numpy())
    theirs = torch.from_numpy(gguf_dequantize(packed, GGMLQuantizationType.MXFP4))
    assert torch.equal(codec_of(spec).decode(stored, spec, x.shape), theirs)


@pytest.mark.parametrize("seed", range(3))
def test_gguf_q8_0_has_the_bytes_of_the_gguf_package(seed):
    x, spec = normal(8, 128, seed=seed) * 10.0 ** (seed - 1), spec_of("q8_0_gguf")
    x[0, :32] = 0
    x[1, :32] = torch.arange(-16, 16) * 0.5 + 0.25
    theirs = gguf_quantize(x.numpy(), GGMLQuantizationType.Q8_0).reshape(-1, 34)
    stored = codec_of(spec).encode(x, spec)
    assert np.array_equal(theirs[:, :2].copy().view(np.float16)[:, 0], stored["scale"].view(-1).numpy())
    assert np.array_equal(theirs[:, 2:].view(np.int8), stored["codes"].view(-1, 32).numpy())
    back = gguf.quants.dequantize(theirs, GGMLQuantizationType.Q8_0).reshape(8, 128)
    assert torch.equal(codec_of(spec).decode(stored, spec, x.shape), torch.from_numpy(back))


def test_nvfp4_codes_are_packed_as_compressed_tensors_packs_them():
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    x, spec = normal(16, 128), spec_of("nvfp4")
    stored = codec_of(spec).encode(x, spec)
    elements = e2m1_values(unpack(stored["codes"], 4, 128))
    assert torch.equal(pack_fp4_to_uint8(elements.bfloat16()), stored["codes"])
    greatest = float(stored["tensor_scale"]) * 6 * 448
    assert greatest == pytest.approx(float(x.abs().max()), rel=1e-6)
    assert stored["scale"].dtype == torch.float8_e4m3fn
    assert float(stored["scale"].float().max()) == 448


@given(hnp.arrays(np.float32, (4, 48), elements=st.floats(-1e4, 1e4, width=32)), st.integers(0, 6))
def test_an_nvfp4_weight_under_another_power_of_two_keeps_its_values_where_no_block_is_said_to_change(values, more):
    x, spec = torch.from_numpy(values), spec_of("nvfp4", scales="power_of_two")
    stored = codec_of(spec).encode(x, spec)
    own, least = stored["tensor_scale"], x.abs().max() / (6 * 448)
    if least >= torch.finfo(torch.float32).tiny:
        assert math.log2(float(own)).is_integer() and least <= own < 2 * least
    assert stored["scale"].float().max() <= 448
    moved, changed = with_tensor_scale(stored, own * 2**more)
    assert moved["scale"].float().isfinite().all()
    before, after = (codec_of(spec).decode(parts, spec, x.shape) for parts in (stored, moved))
    blocks = ((before != after).view(4, 3, 16).any(-1)).sum()
    # A block of zeros has any scale.
    assert blocks <= changed and (more or not changed)
    large = stored["scale"].float() * 2.0**-more >= 2.0**-6
    assert torch.equal(before.view(4, 3, 16)[large], after.view(4, 3, 16)[large])


@pytest.mark.parametrize("activation", [False, True])
def test_values_of_nvfp4_depend_on_all_that_share_the_tensors_scale_and_the_codec_says_so(activation):
    x, spec = normal(8, 32), spec_of("nvfp4", activation)
    x[7] *= 1000
    codec = codec_of(spec)
    assert not torch.equal(codec.fake(x, spec)[:7], codec.fake(x[:7], spec)) and codec.couples_tokens(spec)


def test_a_power_of_two_costs_nvfp4_no_more_than_the_scale_of_the_greatest_block():
    x = normal(256, 512)
    errors = []
    for scales in ("float32", "power_of_two"):
        spec = spec_of("nvfp4", scales=scales)
        errors.append(float((codec_of(spec).fake(x, spec) - x).square().mean()))
    assert abs(errors[1] / errors[0] - 1) < 0.02
