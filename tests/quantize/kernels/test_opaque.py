"""Operations that a compiler does not look into give what the kernels behind them give, in the shapes that are told beforehand."""

import copy

import pytest
import torch
from torch.nn import functional

from quantize.grid.affine import Grid
from quantize.kernels.base import integer_rows, integer_weight
from quantize.kernels.choice import Choice
from quantize.kernels.opaque import causal_attention, integer_sums, is_compiled, linear
from quantize.kernels.stored import Products
from quantize.kernels.traced import traced_rows
from quantize.modules.packed import PackedLinear
from quantize.spec.quant_spec import QuantSpec

CHECKS = ("test_schema", "test_faketensor")
TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True)


def packed(inputs=None, bits=8):
    made = PackedLinear.from_weight(torch.randn(48, 32), None, QuantSpec(bits=bits), inputs)
    made.use_kernels(Choice())
    made(torch.randn(3, 32))
    return made


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_sums_times_the_rows_scales_are_the_linear_to_the_last_bit(rows, bits):
    made, x = packed(TOKEN, bits), torch.randn(rows, 32)
    whole, step = traced_rows(x, 8)
    given = integer_rows(x, TOKEN, None)
    assert torch.equal(whole.to(torch.int8), given.codes) and torch.equal(step, given.scale)
    handle = made._kernel.handle
    assert torch.equal(integer_sums(whole, step, handle, 48) * step, made(x))
    torch.library.opcheck(torch.ops.ptq.integer_sums.default, (whole, step, handle, 48), test_utils=CHECKS)


def test_a_linear_of_floating_point_inputs_is_that_of_its_kernels():
    made, x = packed(), torch.randn(2, 5, 32)
    assert isinstance(made._kernel, Products)
    assert torch.equal(linear(x, made._kernel.handle, 48), made(x))
    torch.library.opcheck(torch.ops.ptq.linear.default, (x, made._kernel.handle, 48), test_utils=CHECKS)


def test_a_copy_has_a_handle_of_its_own_and_one_of_what_is_gone_is_refused():
    kernel = packed(TOKEN)._kernel
    twin = copy.deepcopy(kernel)
    assert twin.handle != kernel.handle
    handle, x = kernel.handle, torch.zeros(2, 32)
    del kernel
    with pytest.raises(RuntimeError, match="compile it again"):
        integer_sums(x, torch.ones(2, 1), handle, 48)
    twin.take(integer_weight(torch.ones(48, 32, dtype=torch.int8), packed_grid()))
    assert integer_sums(x, torch.ones(2, 1), twin.handle, 48).eq(0).all()


def packed_grid():
    return Grid(torch.ones(48, 1), None, -127, 127)


@pytest.mark.parametrize("tokens", [2, 65, 129, 200])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_causal_attention_is_torchs_own_in_transformers_order(tokens, scale):
    query, key, value = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 16)
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    found = causal_attention(query, key, value, scale)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5) and found.is_contiguous()
    torch.library.opcheck(torch.ops.ptq.causal_attention.default, (query, key, value, scale), test_utils=CHECKS)


def test_nothing_is_compiled_that_runs_by_itself():
    assert not is_compiled()
