"""Scales that fit into fp16, and symmetric ranges with the lowest code, against numpy and the definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.grid.affine import dequantize, grid_from_range, grouped, quantize
from quantize.grid.ranges import weight_grid
from quantize.modules.simulated import QuantLinear, fake_quantize_dynamic
from quantize.spec.quant_spec import QuantSpec, SpecError


def random(seed, exponent, shape=(6, 64)):
    return torch.from_numpy((np.random.default_rng(seed).standard_normal(shape) * 10.0**exponent).astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.floats(-6, 3), st.sampled_from([2, 4, 8]), st.sampled_from(["channel", "group"]))
def test_float16_scales_are_fp16_numbers_next_to_the_float32_ones(seed, exponent, bits, granularity):
    w = random(seed, exponent)
    size = 16 if granularity == "group" else None
    fine, coarse = (
        weight_grid(w, QuantSpec(bits, granularity=granularity, group_size=size, scales=scales))
        for scales in ("float32", "float16")
    )
    assert torch.equal(coarse.scale, coarse.scale.half().float())
    assert ((coarse.scale - fine.scale).abs() <= fine.scale * 2**-11 + 2**-25).all()


@given(st.integers(0, 2**32 - 1), st.floats(-8, 2.5), st.sampled_from([2, 3, 4, 5, 6]))
def test_float16_min_makes_every_value_exact_as_step_and_least_value_in_fp16(seed, exponent, bits):
    w = random(seed, exponent)
    spec = QuantSpec(bits, granularity="group", group_size=32, symmetric=False, scales="float16_min")
    grid = weight_grid(w, spec)
    codes = quantize(grouped(w, spec), grid)
    step, least = grid.scale.half(), (-grid.zero_point * grid.scale).half()
    assert torch.equal(step.float(), grid.scale) and torch.equal(least.float(), -grid.zero_point * grid.scale)
    as_gguf = codes.float() * step.float() + least.float()
    assert torch.equal(as_gguf, dequantize(codes, grid))
    error = (as_gguf - grouped(w, spec)).abs().amax(-1, keepdim=True)
    assert (error <= grid.scale * (0.51 + (2**bits - 1) * 2.0 ** (bits - 11)) + 2.0 ** (bits - 24)).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]))
def test_the_full_range_is_the_runtime_rounding_of_compressed_tensors(seed, bits):
    x = random(seed, 0)
    spec = QuantSpec(bits, granularity="token", dynamic=True, full_range=True)
    scale = x.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    expected = (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    assert torch.equal(fake_quantize_dynamic(x, spec), expected)


def test_huge_ranges_stay_finite_with_the_full_range():
    huge = torch.tensor([torch.finfo(torch.float32).max])
    grid = grid_from_range(-huge, huge, 8, True, full_range=True)
    assert torch.isfinite(dequantize(quantize(torch.stack([-huge, huge]), grid), grid)).all()


def test_fp16_scales_are_counted_with_two_bytes():
    w = random(0, 0)
    sizes = {
        s: QuantLinear(w, None, QuantSpec(granularity="group", group_size=32, scales=s)) for s in ("float32", "float16")
    }
    assert [m.bits_per_weight() for m in sizes.values()] == [9.0, 8.5]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scales": "float16_min"}, "scales"),
        ({"scales": "float16_min", "symmetric": False}, "scales"),
        ({"scales": "fp16"}, "scales"),
        ({"full_range": True, "symmetric": False}, "full_range"),
    ],
)
def test_combinations_without_a_meaning_are_refused(changes, field):
    with pytest.raises(SpecError) as error:
        QuantSpec(**changes)
    assert error.value.field == field
