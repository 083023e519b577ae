"""The packed Linear: the simulated one's function, from codes alone; frozen, but gradients pass; built empty and filled."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.codecs.llm_int8 import WEIGHT
from quantize.codecs.registry import codec_of
from quantize.modules.packed import LlmInt8Linear, PackedLinear, packed_type
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.reference import normal

INTS = [
    QuantSpec(
        bits=bits, granularity=granularity, group_size=64 if granularity == "group" else None, symmetric=symmetric
    )
    for bits in (2, 3, 4, 8)
    for granularity in ("tensor", "channel", "group")
    for symmetric in (True, False)
]
WEIGHTS = [
    *INTS,
    *(spec_of(name) for name in formats() if name != "int" and formats()[name].weight),
    spec_of("nf4", double_quant=True),
    spec_of("fp4", double_quant=True),
    spec_of("fp8_e4m3", granularity="tensor"),
    spec_of("fp8_e5m2", granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=32, scales="float16"),
    QuantSpec(bits=4, granularity="group", group_size=32, symmetric=False, scales="float16_min"),
]
INPUTS = [None, *(spec_of(name, activation=True) for name in formats() if formats()[name].activation)]


def simulated(weight, bias, spec, input_spec=None):
    return QuantLinear(weight, bias, spec, None if input_spec is None else InputQuantizer(input_spec))


def packed(weight, bias, spec, input_spec=None):
    return packed_type(spec, input_spec).from_weight(weight, bias, spec, input_spec)


@given(spec=st.sampled_from(WEIGHTS), inputs=st.sampled_from(INPUTS), seed=st.integers(0, 9), bias=st.booleans())
def test_it_computes_the_function_of_the_simulated_linear(spec, inputs, seed, bias):
    weight, x = normal(24, 128, seed=seed), 3 * normal(2, 5, 128, seed=seed + 100)
    added = normal(24, seed=seed + 200) if bias else None
    expected = simulated(weight, added, spec, inputs)
    for module in (packed(weight, added, spec, inputs), PackedLinear.from_quantized(expected)):
        assert torch.equal(module.dequantized(), expected.weight)
        # The int8 product sums in another order than a product in fp32.
        exact = type(module) is PackedLinear
        y = module(x)
        assert torch.equal(y, expected(x)) if exact else torch.allclose(y, expected(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_what_it_stores_is_what_its_layout_says_and_no_weight_stands_beside_it(spec):
    module = packed(normal(24, 128), None, spec)
    layout = codec_of(spec).layout((24, 128), spec)
    assert {name: (tuple(p.shape), p.dtype) for name, p in module.named_parameters()} == layout
    assert not list(module.buffers())
    assert not any(isinstance(v, torch.Tensor) for v in vars(module).values())
    assert module.stored_bytes() == simulated(normal(24, 128), None, spec).stored_bytes() or spec.scales != "float32"


def test_codes_below_a_byte_are_packed():
    for bits, share in ((2, 4), (4, 2), (8, 1)):
        module = packed(normal(24, 128), None, QuantSpec(bits=bits))
        assert module.codes.numel() * share == 24 * 128
    assert packed(normal(64, 1024), None, spec_of("nf4", double_quant=True)).bits_per_weight() == pytest.approx(
        4.127, abs=2e-3
    )


@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_built_on_the_meta_device_it_is_filled_by_a_state_dict(spec):
    full = packed(normal(24, 128), normal(24, seed=1), spec)
    empty = PackedLinear(128, 24, True, spec, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    copied = PackedLinear(128, 24, True, spec)
    copied.load_state_dict(full.state_dict())
    x = normal(3, 128, seed=2)
    assert torch.equal(empty(x), full(x))
    assert torch.equal(copied(x), full(x))
    assert not any(p.requires_grad for p in (*empty.parameters(), *copied.parameters()))


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("spec", [WEIGHT, spec_of("nf4")], ids=str)
def test_gradients_reach_the_input_through_the_frozen_weight_and_no_weight_is_kept_for_them(spec, inputs):
    module = packed(normal(24, 128), normal(24, seed=1), spec, inputs)
    x = normal(2, 3, 128, seed=2).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    upstream = normal(*y.shape, seed=3)
    y.backward(upstream)
    assert torch.allclose(x.grad, upstream @ module.dequantized(), atol=1e-5)
    assert {t.data_ptr() for t in kept} <= {p.data_ptr() for p in module.parameters()}
    with torch.no_grad():
        assert torch.equal(module(x), y)


def test_a_bias_that_is_trained_gets_its_gradient():
    module = packed(normal(24, 128), normal(24, seed=1), spec_of("nf4"))
    module.bias.requires_grad_()
    module(normal(2, 3, 128)).sum().backward()
    assert torch.allclose(module.bias.grad, torch.full((24,), 6.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_another_compute_type_leaves_codes_and_scales_as_they_are(spec, dtype):
    module = packed(normal(24, 128), normal(24, seed=1), spec)
    half = copy.deepcopy(module).to(dtype)
    assert half.bias.dtype == dtype
    before, after = module.stored, half.stored
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert torch.equal(half.dequantized(), module.dequantized())
    assert half(normal(3, 128, dtype=dtype)).dtype == dtype


def test_zero_rows_and_zero_inputs_stay_zero():
    weight = normal(24, 128)
    weight[3] = 0
    for spec in WEIGHTS:
        module = packed(weight, None, spec)
        assert not module.dequantized()[3].any()
        assert not module(torch.zeros(2, 128)).any()


def test_it_is_a_linear_to_others_whose_weight_can_be_read_but_not_written():
    module = packed(normal(24, 128), None, WEIGHT, spec_of("llm_int8", activation=True))
    assert isinstance(module, nn.Linear) and isinstance(module, LlmInt8Linear)
    assert torch.equal(module.weight, module.dequantized())
    assert type(module.weight + 1) is torch.Tensor
    with pytest.raises(ValueError, match="dequantize_"):
        module.weight.data += 1
    with pytest.raises(ValueError, match="dequantize_"):
        module.weight.data = normal(24, 128)
    with pytest.raises(AttributeError, match="wieght"):
        _ = module.wieght


@pytest.mark.parametrize(
    ("weight", "spec", "inputs", "message"),
    [
        (normal(8, 24), spec_of("nf4"), None, "64 does not divide the last dimension 24"),
        (normal(8, 24), spec_of("q8_0", group_size=80), None, "80 does not divide the 192 values"),
        (torch.full((8, 64), torch.nan), spec_of("nf4"), None, "NaN or inf"),
        (torch.ones(8, 64, dtype=torch.int8), WEIGHT, None, "int8"),
        (torch.ones(8, 64, device="meta"), WEIGHT, None, "meta"),
        (normal(8, 64), QuantSpec(granularity="cluster"), None, "cluster"),
        (normal(8, 64), WEIGHT, QuantSpec(granularity="tensor"), "dynamic"),
        (normal(8, 24), WEIGHT, spec_of("mxfp8", activation=True), "32 does not divide"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, spec, inputs, message):
    with pytest.raises(ValueError, match=message):
        packed(weight, None, spec, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_the_weight_that_is_read_has_the_models_type(spec, dtype):
    made = packed(normal(24, 128).to(dtype), None, spec)
    moved = packed(normal(24, 128), None, spec).to(dtype)
    empty = PackedLinear(128, 24, False, spec, dtype=dtype, device="meta")
    simulation = PackedLinear.from_quantized(simulated(normal(24, 128).to(dtype), None, spec))
    for module in (made, moved, empty, simulation, copy.deepcopy(made)):
        assert module.weight.dtype == module.dtype == dtype
    assert moved.float().weight.dtype == torch.float32
    assert moved.half().weight.dtype == torch.float16
    assert moved.to("meta").weight.dtype == torch.float16


@pytest.mark.parametrize("spec", [*INPUTS[1:], QuantSpec(granularity="tensor", dynamic=True)], ids=str)
def test_a_batch_gives_what_its_samples_give_one_by_one_and_no_tokens_give_none(spec):
    weight = WEIGHT if spec.format == "llm_int8" else QuantSpec()
    module = packed(normal(24, 128), normal(24, seed=1), weight, spec)
    x = normal(4, 6, 128, seed=2) * torch.tensor([1, 20, 0.1, 4]).view(4, 1, 1)
    alone = torch.cat([module(sample) for sample in x.split(1)])
    assert torch.allclose(module(x), alone, rtol=1e-5, atol=1e-5)
    assert module(torch.empty(0, 128)).shape == (0, 24) and module(torch.empty(2, 0, 128)).shape == (2, 0, 24)


class _FromHost(TorchDispatchMode):
    """Counts the tensors that are made of Python's numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_a_call_copies_no_table_from_the_host(spec):
    module, x = packed(normal(24, 128), None, spec), normal(3, 128)
    with _FromHost() as counted:
        torch.tensor(1.0)
    assert counted.count == 1
    expected = module(x)
    with _FromHost() as counted:
        y = module(x)
    assert counted.count == 0 and torch.equal(y, expected)
