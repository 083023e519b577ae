"""gemlite's products on CUDA: by its rules of shapes everywhere, and beside the dequantized weight where there is a GPU."""

from importlib.util import find_spec

import pytest
import torch

from quantize.codecs.registry import codec_of
from quantize.kernels.choice import Choice
from quantize.kernels.floating import StoredWeight, registered_floating
from quantize.kernels.stored import SLACK, able, stored_names
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.reference import normal

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
GROUPS = QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False)


@pytest.mark.parametrize(
    ("weight", "shape", "device", "dtype", "why"),
    [
        (GROUPS, (64, 128), CPU, BF16, "it runs on CUDA, not on cpu"),
        (spec_of("nf4"), (64, 128), CUDA, BF16, "it takes integers with one scale a row or a group, and mxfp4"),
        (GROUPS, (64, 128), CUDA, torch.float32, "it multiplies no float32"),
        (QuantSpec(bits=4), (64, 120), CUDA, BF16, "it takes weights whose columns (here 120) are a multiple of 32"),
        (QuantSpec(bits=4, granularity="group", group_size=8), (64, 128), CUDA, BF16, "it takes groups of 16 columns and more"),
    ],
)  # fmt: skip
def test_what_it_cannot_multiply_it_says(weight, shape, device, dtype, why):
    assert registered_floating()["gemlite"].refusal(weight, None, shape, device, dtype) == why


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refusal = registered_floating()["gemlite"].refusal(GROUPS, None, (64, 128), CUDA, FP16)
    assert refusal == "it needs gemlite and triton: pip install 'ptq-framework[gemlite]'"
    assert "gemlite" in stored_names()


def test_with_the_extra_16_bit_models_on_cuda_have_it_by_themselves(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for spec in (GROUPS, QuantSpec(bits=3), QuantSpec(bits=8, granularity="tensor"), spec_of("mxfp4")):
        found = able(Choice(hold_bits=9), spec, None, (64, 128), CUDA, BF16)
        assert "gemlite" in [kernel.name for kernel in found.floating], spec
    kernel = registered_floating()["gemlite"]
    assert [kernel.held_bits(QuantSpec(bits=bits), BF16) for bits in (2, 3, 4, 5, 8)] == [2, 4, 4, 8, 8]
    assert kernel.held_bits(GROUPS, BF16) == 4.5


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("gemlite") is None, reason="wants a GPU and the extra gemlite"
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 65])
@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits=bits) for bits in (2, 3, 4, 8)),
        *(QuantSpec(bits=bits, granularity="group", group_size=64, symmetric=s) for bits in (2, 4, 8) for s in (True, False)),
        QuantSpec(bits=4, symmetric=False), QuantSpec(bits=8, granularity="tensor"), spec_of("mxfp4"),
    ],
    ids=str,
)  # fmt: skip
def test_on_a_gpu_it_gives_the_product_of_the_dequantized_weight(spec, rows, dtype):
    w, x = normal(96, 256).to(CUDA, dtype), normal(rows, 256, seed=1).to(CUDA, dtype)
    held = StoredWeight(codec_of(spec).encode(w, spec), spec, None, (96, 256), dtype)
    dense = codec_of(spec).decode(held.stored, spec, (96, 256)).double()
    found = registered_floating()["gemlite"].prepare(held)(x)
    bound = SLACK * torch.finfo(dtype).eps * (x.double().abs() @ dense.abs().t()) + 1e-30
    assert found.dtype is dtype and found.shape == (rows, 96)
    assert bool(((found.double() - x.double() @ dense.t()).abs() <= bound).all())
