"""Products of FP8: the rounded operands' product to rounding on CPUs, and on CUDA by its rules of shapes."""

import pytest
import torch

from quantize.kernels.choice import Choice
from quantize.kernels.floating import registered_floating
from quantize.kernels.stored import able
from quantize.modules.packed import PackedLinear
from quantize.spec.quant_spec import spec_of
from tests.quantize.reference import normal

CHANNEL, TENSOR = spec_of("fp8_e4m3"), spec_of("fp8_e4m3", granularity="tensor")
TOKEN = spec_of("fp8_e4m3", activation=True)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [CHANNEL, TENSOR], ids=["channel", "tensor"])
@pytest.mark.parametrize("shape", [(16, 64), (11, 24), (33, 130)])
def test_a_packed_linear_computes_what_it_does_without(spec, shape, dtype):
    if (
        refusal := registered_floating()["scaled_mm"].refusal(spec, TOKEN, shape, torch.device("cpu"), dtype)
    ) is not None:
        pytest.skip(refusal)
    module = PackedLinear.from_weight(normal(*shape).to(dtype), normal(shape[0], seed=1).to(dtype), spec, TOKEN)
    x = (3 * normal(2, 3, shape[1], seed=2)).to(dtype)
    x[0, 0] = 0
    expected = module(x)
    module.use_kernels(Choice("scaled_mm"))
    found = module(x)
    assert found.dtype == dtype and module.kernel_bytes() == 0
    tolerance = {"rtol": 1e-5, "atol": 5e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.5}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(module(x[:, :1]), found[:, :1], **tolerance)
    assert module(x[:0]).shape == (0, 3, shape[0])


@pytest.mark.parametrize(
    ("weight", "inputs", "shape", "device", "dtype", "why"),
    [
        (spec_of("nf4"), TOKEN, (16, 64), CUDA, torch.bfloat16, "it takes fp8_e4m3"),
        (CHANNEL, None, (16, 64), CUDA, torch.bfloat16, "it rounds inputs to fp8_e4m3"),
        (CHANNEL, spec_of("fp8_e4m3", activation=True, granularity="tensor"), (16, 64), CUDA, torch.bfloat16, "it rounds inputs"),
        (CHANNEL, TOKEN, (16, 64), CUDA, torch.float32, "on CUDA it gives bfloat16"),
        (CHANNEL, TOKEN, (24, 64), CUDA, torch.bfloat16, "must be multiples of 16"),
        (CHANNEL, TOKEN, (16, 64), torch.device("meta"), torch.bfloat16, "it runs on CPUs and CUDA, not on meta"),
    ],
)  # fmt: skip
def test_what_it_cannot_multiply_it_says(weight, inputs, shape, device, dtype, why):
    assert registered_floating()["scaled_mm"].refusal(weight, inputs, shape, device, dtype).startswith(why) or why in (
        registered_floating()["scaled_mm"].refusal(weight, inputs, shape, device, dtype)
    )


def test_fp8_models_have_it_by_themselves():
    found = able(Choice(hold_bits=8), CHANNEL, TOKEN, (16, 64), torch.device("cpu"), torch.float32)
    if "one scale for all rows only" in found.reason:
        pytest.skip(found.reason)
    assert [kernel.name for kernel in found.floating] == ["scaled_mm"]
