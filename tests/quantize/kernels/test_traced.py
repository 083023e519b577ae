"""The product of one row that a compiler is given: the stored weight's own, for every integer format of whole bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.kernels.choice import Choice
from quantize.kernels.traced import RowProduct
from quantize.modules.packed import PackedLinear
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.reference import normal

TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True)
FORMATS = [
    QuantSpec(
        bits=bits, granularity=kind, group_size=32 if kind == "group" else None, symmetric=symmetric, scales=scales
    )
    for bits in (2, 4, 8)
    for kind in ("tensor", "channel", "group")
    for symmetric in (True, False)
    for scales in ("float32", "float16")
]


def packed(spec, inputs, rows=24, columns=128, bias=None, seed=0):
    module = PackedLinear.from_weight(normal(rows, columns, seed=seed), bias, spec, inputs)
    module.use_kernels(Choice())
    return module


def by_row(module, x):
    product = RowProduct.of(module.weight_spec, module.input_spec, (module.out_features, module.in_features))
    return product(x, module.codes, module.scale, module.stored.get("zero_point"))


@given(
    spec=st.sampled_from(FORMATS),
    inputs=st.sampled_from([None, TOKEN, QuantSpec(bits=4, granularity="token", dynamic=True)]),
    rows=st.integers(1, 9),
    seed=st.integers(0, 9),
    factor=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
)
def test_it_is_the_product_of_the_rounded_input_and_the_decoded_weight(spec, inputs, rows, seed, factor):
    module, x = packed(spec, inputs, rows, seed=seed), factor * normal(1, 1, 128, seed=seed + 50)
    module.use_kernels(None)
    found, expected = by_row(module, x), module(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    # Terms add up in another order, zero points once a group.
    size = x.abs().sum() * module.dequantized().abs().max() + module.scale.float().abs().max() * x.abs().max() * 2**8
    assert float((found - expected).abs().max()) <= 1e-5 * float(size)


def test_integer_codes_give_the_very_bits_of_the_integer_kernels():
    module, x = packed(QuantSpec(bits=8), TOKEN, 40, 1024), 3 * normal(1, 1, 1024, seed=1)
    assert torch.equal(by_row(module, x), module(x))


def test_a_row_that_holds_nan_gives_nan():
    x = normal(1, 128)
    x[0, 5] = float("nan")
    assert by_row(packed(QuantSpec(bits=8), TOKEN), x).isnan().all()


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        (QuantSpec(bits=3), None),
        (spec_of("nf4"), None),
        (QuantSpec(bits=8), QuantSpec(bits=8, granularity="token", dynamic=True, symmetric=False)),
        (QuantSpec(bits=8), QuantSpec(bits=8, granularity="group", group_size=32, dynamic=True)),
        (QuantSpec(bits=8), spec_of("fp8_e4m3", activation=True)),
    ],
)
def test_other_formats_have_none(weight, inputs):
    assert RowProduct.of(weight, inputs, (24, 128)) is None


def test_groups_have_whole_bytes():
    for size, able in ((1, False), (2, True)):
        spec = QuantSpec(bits=4, granularity="group", group_size=size)
        assert (RowProduct.of(spec, None, (24, 128)) is not None) is able


@pytest.mark.parametrize("inputs", [None, TOKEN])
@torch.no_grad()
def test_what_is_compiled_has_it_for_one_row_and_the_definition_for_more(monkeypatch, inputs):
    module, rows = packed(QuantSpec(bits=4), inputs, bias=normal(24, seed=3)), []
    original = RowProduct._dot

    def counted(self, row, *rest):
        rows.append(len(row))
        return original(self, row, *rest)

    monkeypatch.setattr(RowProduct, "_dot", counted)
    compiled = torch.compile(lambda x: module(x), backend="eager", fullgraph=True, dynamic=False)
    for x, seen in ((normal(1, 1, 128), 1), (normal(2, 3, 128), 0)):
        rows.clear()
        assert torch.allclose(compiled(x), module(x), rtol=1e-5, atol=1e-4)
        assert len(rows) == seen
    rows.clear()
    exported = torch.export.export(module, (normal(1, 1, 128),))
    assert not rows and torch.allclose(exported.module()(normal(1, 1, 128)), module(normal(1, 1, 128)), atol=1e-4)
    module.use_kernels(None)
    torch._dynamo.reset()
    torch.compile(lambda x: module(x), backend="eager")(normal(1, 1, 128))
    assert not rows
