"""Storage from shapes is what a quantized Linear counts in its tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.codecs.registry import codec_of
from quantize.grid.storage import weight_storage
from quantize.modules.simulated import QuantLinear
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, spec_of


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.integers(1, 8),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    scales=st.sampled_from(["float32", "float16"]),
)
def test_the_shape_alone_tells_the_bytes_of_a_quantized_linear(
    rows, groups, size, bits, symmetric, granularity, scales
):
    group = size if granularity == "group" else None
    spec = QuantSpec(bits=bits, granularity=granularity, group_size=group, symmetric=symmetric, scales=scales)
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(rows))
    module = QuantLinear(weight, None, spec)
    storage = weight_storage(*weight.shape, spec)
    assert -(-storage.bits // 8) == module.stored_bytes()
    assert (storage.codes, storage.scales) == (module.codes.numel(), module.scale.numel())
    assert storage.zero_points == (0 if module.zero_point is None else module.zero_point.numel())


def test_a_group_of_64_with_a_zero_point_costs_nine_sixteenths_of_a_bit():
    spec = QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False)
    assert weight_storage(32, 640, spec).bits / (32 * 640) == 4 + (32 + 4) / 64


@pytest.mark.parametrize("granularity", ["cluster", "token"])
def test_a_number_of_scales_that_no_shape_tells_is_refused(granularity):
    with pytest.raises(ValueError, match=f"granularity: '{granularity}'"):
        weight_storage(8, 8, QuantSpec(granularity=granularity))


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group_size: 3 does not divide the 8 columns"):
        weight_storage(8, 8, QuantSpec(granularity="group", group_size=3))


def test_a_format_that_is_more_than_codes_and_scales_is_refused():
    with pytest.raises(ValueError, match="format: 'nf4' .* Codec.layout"):
        weight_storage(8, 64, spec_of("nf4"))


@pytest.mark.parametrize("name", [name for name, form in formats().items() if form.weight])
@pytest.mark.parametrize("rows", [1, 9])
def test_every_format_knows_what_it_stores_of_a_shape(name, rows):
    spec = spec_of(name, double_quant=formats()[name].double_quant)
    weight = torch.randn(rows, 320, generator=torch.Generator().manual_seed(rows))
    stored = codec_of(spec).encode(weight, spec)
    assert codec_of(spec).layout((rows, 320), spec) == {k: (tuple(v.shape), v.dtype) for k, v in stored.items()}
