"""Kernels that read weights as they are stored: the product of the rounded operands to rounding, and who is taken."""

import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.codecs.registry import codec_of
from quantize.kernels.base import SHIFT, IntegerRows, registered
from quantize.kernels.choice import Choice, Multiplier
from quantize.kernels.fastest import KernelMismatch
from quantize.kernels.floating import StoredWeight, registered_floating
from quantize.kernels.stored import SLACK, Products, able, stored_names
from quantize.kernels.weight_only.digits import split
from quantize.modules.packed import LlmInt8Linear, PackedLinear, packed_type
from quantize.modules.shared_input import SharedInput
from quantize.modules.simulated import fake_quantize_dynamic
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.reference import normal

CPU = torch.device("cpu")
TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True)


def grouped(bits, size, **more):
    return QuantSpec(bits=bits, granularity="group", group_size=size, **more)


weights = st.one_of(
    st.builds(lambda bits: QuantSpec(bits=bits), st.integers(2, 8)),
    st.builds(
        lambda bits, size, symmetric: grouped(bits, size, symmetric=symmetric),
        st.integers(2, 8), st.sampled_from([16, 32, 64]), st.booleans(),
    ),
    st.sampled_from([spec_of("nf4"), spec_of("fp8_e4m3"), spec_of("mxfp4"), QuantSpec(bits=8, granularity="tensor")]),
)  # fmt: skip


@given(
    weights, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(0, 20), st.sampled_from([16, 11]),
    st.integers(0, 9), st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_kernel_gives_the_product_of_the_rounded_operands(spec, dtype, rounds, rows, out, seed, size):
    w, x = (normal(out, 64, seed=seed) * size).to(dtype), normal(rows, 128, seed=seed + 1).to(dtype)[:, ::2]
    inputs = (
        grouped(8, spec.group_size, dynamic=True) if rounds and spec.affine and spec.granularity == "group" else None
    )
    held = StoredWeight(codec_of(spec).encode(w, spec), spec, inputs, tuple(w.shape), dtype)
    dense = codec_of(spec).decode(held.stored, spec, w.shape).double()
    rounded = x if inputs is None else fake_quantize_dynamic(x.float(), inputs)
    exact = rounded.double() @ dense.t()
    bound = SLACK * torch.finfo(dtype).eps * (rounded.double().abs() @ dense.abs().t()) + 1e-30
    if inputs is not None and rows:
        # At the edge between two codes a division and a product by the inverse may differ.
        bound += x.double().abs().amax(1, keepdim=True) / 64 * dense.abs().max()
    ran = 0
    for kernel in registered_floating().values():
        if kernel.refusal(spec, inputs, tuple(w.shape), CPU, dtype) is None and (kernel.rounds or inputs is None):
            y = kernel.prepare(held)(x)
            assert y.dtype == dtype and y.shape == (rows, out), kernel.name
            assert bool(((y.double() - exact).abs() <= bound).all()), kernel.name
            ran += 1
    assert ran or inputs is not None


@pytest.mark.parametrize(
    "inputs", [None, TOKEN, grouped(8, 32, dynamic=True), spec_of("fp8_e4m3", activation=True)], ids=str
)
@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(bits=4), grouped(4, 32), spec_of("nf4")], ids=str)
def test_a_packed_linear_by_kernels_computes_what_it_does_without_and_so_does_its_copy(spec, inputs):
    module = packed_type(spec, inputs).from_weight(normal(32, 128), normal(32, seed=1), spec, inputs)
    x = normal(2, 5, 128, seed=2)
    expected = module(x)
    for bits in (8.0, 64.0):
        module.use_kernels(Choice(hold_bits=bits))
        for given_x in (x, x[:1, :1], x[:0]):
            found = module(given_x)
            assert found.shape == (*given_x.shape[:-1], 32)
            torch.testing.assert_close(found, expected[: len(given_x), : given_x.shape[1]], rtol=1e-4, atol=2e-2)
        assert torch.equal(copy.deepcopy(module)(x), module(x))
    module.use_kernels(None)
    assert torch.equal(module(x), expected) and module.kernel_bytes() == 0


def test_a_weight_that_is_filled_anew_or_moved_is_packed_again():
    one, other = (PackedLinear.from_weight(normal(16, 64, seed=s), None, QuantSpec(bits=8), TOKEN) for s in (0, 1))
    for module in (one, other):
        module.use_kernels(Choice())
    x = normal(3, 64, seed=2)
    before = one(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x)) and not torch.equal(one(x), before)
    one.store(normal(16, 64))
    assert torch.equal(one(x), before)
    half = one.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), before, rtol=5e-2, atol=5e-1)


def test_what_kernels_hold_stays_below_what_they_may_hold_and_is_counted():
    nf4, w4 = spec_of("nf4"), QuantSpec(bits=4)
    assert able(Choice(hold_bits=8), nf4, None, (32, 64), CPU, torch.float32).reason.startswith(
        "dequantized: it would hold 32 bits a weight, and hold_bits is 8"
    )
    assert [k.name for k in able(Choice(hold_bits=32), nf4, None, (32, 64), CPU, torch.float32).floating] == [
        "dequantized"
    ]
    assert "int8pack" in {k.name for k in able(Choice(hold_bits=8), w4, None, (32, 64), CPU, torch.float32).floating}
    assert able(Choice(hold_bits=7), w4, TOKEN, (32, 64), CPU, torch.float32).integer is False
    module = PackedLinear.from_weight(normal(32, 64), None, nf4)
    module.use_kernels(Choice("dequantized"))
    assert module.kernel_bytes() == 0
    module(normal(1, 64))
    assert module.kernel_bytes() == 32 * 64 * 4
    stored = PackedLinear.from_weight(normal(32, 64), None, QuantSpec(bits=8), TOKEN)
    stored.use_kernels(Choice("int_mm"))
    stored(normal(1, 64))
    assert stored.kernel_bytes() == 0


def test_linears_that_read_one_tensor_quantize_it_once():
    shared, choice = SharedInput(), Choice("int_mm")
    linears = [PackedLinear.from_weight(normal(16, 64, seed=s), None, QuantSpec(bits=8), TOKEN) for s in range(3)]
    for linear in linears:
        linear.use_kernels(choice, shared)
    x = normal(4, 64)
    with torch.no_grad():
        for linear in linears:
            linear(x)
        first = shared.codes(x, TOKEN)
        assert shared.codes(x, TOKEN) is first
        x.add_(1)
        assert shared.codes(x, TOKEN) is not first
    with torch.inference_mode():
        y = normal(4, 64)
        assert shared.codes(y, TOKEN) is not shared.codes(y, TOKEN)
    y = x = None
    assert shared._last is None


def test_kernels_that_differ_beyond_rounding_end_the_work(monkeypatch):
    class Wrong:
        name, held_bits = "wrong", 0.0

        def refusal(self, *given):
            return None

        def prepare(self, weight):
            right = registered()["int_mm"].prepare(weight)
            return lambda rows: right(rows) + 1

    monkeypatch.setattr("quantize.kernels.base._KERNELS", {**registered(), "wrong": Wrong()})
    module = PackedLinear.from_weight(normal(16, 64), None, QuantSpec(bits=8), TOKEN)
    module.use_kernels(Choice())
    with pytest.raises(KernelMismatch, match=r"wrong gives other sums than \w+"):
        module(normal(2, 64))

    class Off:
        name, rounds = "off", False

        def refusal(self, *given):
            return None

        def held_bits(self, *given):
            return 0.0

        def prepare(self, weight):
            return lambda x: x @ weight.dequantized().t() * 1.01

    monkeypatch.setattr("quantize.kernels.floating._KERNELS", {"off": Off()})
    module = PackedLinear.from_weight(normal(16, 64), None, spec_of("nf4"))
    module.use_kernels(Choice())
    with pytest.raises(KernelMismatch, match="off and decoded differ by more than rounding"):
        module(normal(2, 64))


def test_timings_are_found_once_told_to_who_keeps_them_and_taken_from_there():
    class Keeper:
        def __init__(self):
            self.kept, self.told = {}, []

        def recall(self):
            return self.kept

        def keep(self, timings):
            self.kept = dict(timings)
            self.told.append(len(timings))

    keeper = Keeper()
    module = PackedLinear.from_weight(normal(16, 64), None, QuantSpec(bits=4), TOKEN)
    module.use_kernels(choice := Choice(keeper=keeper))
    for rows in (1, 1, 3, 4, 0):
        module(normal(rows, 64))
    assert keeper.told == [1, 2]
    assert {frozenset(t) for t in choice.timings.values()} == {frozenset({"int_mm", "fbgemm", "onednn_int8"})}
    other = copy.deepcopy(module)
    other.use_kernels(later := Choice(keeper=keeper))
    other(normal(4, 64))
    assert keeper.told == [1, 2] and later.timings == choice.timings


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    kernel = registered_floating()["onnxruntime"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refusal = kernel.refusal(grouped(4, 32), None, (32, 64), CPU, torch.float32)
    assert refusal == "it needs onnxruntime and onnx: pip install 'ptq-framework[onnxruntime]'"
    assert "onnxruntime" in stored_names()


def test_the_registry_costs_a_row_at_most_three_microseconds():
    multiplier = Choice("int_mm").multiplier(QuantSpec(bits=8), TOKEN, (16, 16), CPU)
    module = PackedLinear.from_weight(normal(16, 16), None, QuantSpec(bits=8), TOKEN)
    module.use_kernels(Choice("int_mm"))
    x = normal(1, 16)
    module(x)
    assert isinstance(module._kernel, Multiplier) and multiplier is not None
    rows: IntegerRows = module._shared.codes(x, TOKEN)
    direct = module._kernel._of("int_mm")

    def cost(action, calls=3000):
        start = time.process_time()
        for _ in range(calls):
            action()
        return (time.process_time() - start) / calls * 1e6

    # The least of several turns: what else the processor does only adds to it.
    pairs = [
        (cost(lambda: module._kernel.run(rows, rows.codes.shape[0])), cost(lambda: direct(rows))) for _ in range(5)
    ]
    looked = min(cost(lambda: module._settled(x)) for _ in range(5))
    overhead = min(a for a, _ in pairs) - min(b for _, b in pairs) + looked
    assert overhead <= 3, overhead


def test_the_integer_part_of_llm_int8_is_multiplied_by_kernels():
    inputs = spec_of("llm_int8", activation=True)
    module = packed_type(QuantSpec(bits=8), inputs).from_weight(
        normal(16, 64), normal(16, seed=1), QuantSpec(bits=8), inputs
    )
    assert isinstance(module, LlmInt8Linear)
    x = normal(2, 3, 64, seed=2)
    x[0, :, 5] *= 30
    expected = module(x)
    able, _ = Choice().candidates(QuantSpec(bits=8), TOKEN, (16, 64), CPU)
    for name in ("auto", *(kernel.name for kernel in able)):
        module.use_kernels(Choice(name))
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        assert isinstance(module._kernel, Multiplier) and module.outlier_share > 0
    module.use_kernels(Choice("simulated"))
    assert torch.equal(module(x), expected)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 9), st.floats(-25, 35), st.sampled_from([3, 4]))
@settings(max_examples=60, deadline=None)
def test_digits_are_the_activation_to_far_less_than_its_greatest_magnitude(rows, columns, seed, power, count):
    x = normal(rows, columns, seed=seed) * 10.0**power
    digits, step = split(x, count)
    assert digits.shape == (count, rows, columns) and digits.dtype == torch.uint8
    places = torch.tensor([256.0**k for k in range(count)], dtype=torch.float64)
    value = torch.einsum("k,krc->rc", places, digits.double() - SHIFT) * step.double()
    # Half a step, and the rounding of a quotient in float32.
    error = (value - x.double()).abs()
    assert bool((error <= step.double() / 2 + x.double().abs() * 2**-23).all())
    assert bool((step <= x.abs().amax(1, keepdim=True) * 2.0 ** -(8 * count - 2)).all())


def test_digits_of_zeros_are_zero_and_what_is_not_finite_spreads_to_its_row():
    module = PackedLinear.from_weight(normal(16, 64), None, QuantSpec(bits=8))
    module.use_kernels(Choice("digits"))
    x = normal(4, 64)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    y = module(x)
    assert not y[0].any() and not y[1:3].isfinite().any() and y[3].isfinite().all()


def test_products_without_a_weight_say_so():
    with pytest.raises(ValueError, match="call take first"):
        Products((registered_floating()["dequantized"],), "w", None, {})(normal(1, 4), None)


@pytest.mark.parametrize(
    ("variables", "cores", "threads"),
    [
        ({}, 2, 1),
        ({}, 3, 1),
        ({}, 4, 2),
        ({"OMP_WAIT_POLICY": "active"}, 2, 1),
        ({"OMP_WAIT_POLICY": "passive"}, 2, 2),
        ({"GOMP_SPINCOUNT": "0"}, 2, 2),
        ({"GOMP_SPINCOUNT": "1000"}, 2, 1),
    ],
)
def test_onnxruntime_has_one_thread_where_torchs_would_hold_its_cores(monkeypatch, variables, cores, threads):
    from quantize.kernels import onnxruntime_nbits

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(onnxruntime_nbits.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert onnxruntime_nbits.threads() == threads
