"""Integer kernels: every one gives the exact sums of int64, all of them the same bits, and the simulation's output to rounding."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import quantize
from quantize.grid.ranges import dynamic_grid
from quantize.kernels.base import (
    SIMULATED,
    IntegerRows,
    IntegerWeight,
    finish,
    integer_rows,
    integer_weight,
    register,
    registered,
)
from quantize.kernels.choice import Choice, describe, names
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import QuantSpec

CPU = torch.device("cpu")
TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True)
STATIC = QuantSpec(bits=8, granularity="tensor", symmetric=False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(spec, x):
    """The quantizer of an activation, with the ranges that it has."""
    return InputQuantizer(spec, None if spec.dynamic else (x.amin(0), x.amax(0)))


weights = st.builds(
    lambda bits, symmetric, size: QuantSpec(
        bits=bits, symmetric=symmetric, granularity="group" if size else "channel", group_size=size
    ),
    st.integers(2, 8), st.booleans(), st.sampled_from([None, None, 4, 8]),
)  # fmt: skip
activations = st.one_of(
    st.builds(
        lambda bits, symmetric, clip: QuantSpec(
            bits=bits, symmetric=symmetric, granularity="token", dynamic=True, clip=clip
        ),
        st.integers(2, 8), st.booleans(), st.sampled_from([1.0, 0.8]),
    ),
    st.builds(
        lambda bits, symmetric: QuantSpec(bits=bits, symmetric=symmetric, granularity="tensor"),
        st.integers(2, 8), st.booleans(),
    ),
)  # fmt: skip


@given(
    weights, activations, st.integers(0, 20), st.integers(1, 5), st.integers(1, 19), st.integers(0, 9),
    st.sampled_from([1e-3, 1.0, 1e4]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_kernel_gives_the_sums_of_int64_and_the_same_bits(weight_spec, spec, rows, eights, out, seed, size):
    w, x = normal(out, 8 * eights, seed=seed) * size, normal(rows, 8 * eights, seed=seed + 1)
    if rows and not spec.symmetric:
        x = x + 1
    linear = QuantLinear(w, None, weight_spec, inputs_of(spec, x if rows else normal(3, 8 * eights)))
    held = integer_weight(linear.codes, linear._grid)
    taken = linear.inputs.integers(x)
    groups = held.groups
    a = (taken.codes.long() - (0 if taken.zero is None else taken.zero.long())).unflatten(1, (groups, -1))
    b = (held.codes.long()).unflatten(1, (groups, -1))
    b = b if held.zero is None else b - held.zero.long()[..., None]
    sums = torch.einsum("rgc,ogc->gro", a, b)
    expected = torch.zeros(rows, out)
    for g in range(groups):
        expected = expected + sums[g].to(torch.int32) * held.scale[:, g]
    able = [k for k in registered().values() if k.refusal(weight_spec, spec, tuple(w.shape), CPU) is None]
    assert able
    for kernel in able:
        assert torch.equal(kernel.prepare(held)(taken), expected), kernel.name


@given(
    weights, activations, st.integers(1, 12), st.integers(0, 9), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_linear_by_integers_is_the_simulated_one_to_rounding(weight_spec, spec, rows, seed, bias, dtype):
    w, b, x = normal(11, 24, seed=seed), normal(11, seed=seed + 1), normal(rows, 24, seed=seed + 2).to(dtype)
    simulated = QuantLinear(w.to(dtype), b.to(dtype) if bias else None, weight_spec, inputs_of(spec, x))
    integer = copy.deepcopy(simulated)
    integer.use_kernels(Choice())
    assert integer.integer and not simulated.integer
    exact = torch.nn.functional.linear(
        simulated.inputs(x.float()).double(),
        simulated._decoded(torch.float64),
        simulated.bias.double() if bias else None,
    )
    found = integer(x)
    assert found.dtype == dtype and found.shape == (rows, 11)
    # The simulation rounds its operands to the type, the integers the result only.
    magnitude = torch.nn.functional.linear(x.abs().double(), w.abs().double()) + 10
    assert bool(((found.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * magnitude).all())


def test_shapes_batches_and_views_make_no_difference():
    linear = QuantLinear(normal(16, 32), normal(16, seed=1), QuantSpec(bits=8), InputQuantizer(TOKEN))
    linear.use_kernels(Choice())
    x = normal(4, 5, 64, seed=2)[..., ::2]
    whole = linear(x)
    assert whole.shape == (4, 5, 16)
    one_by_one = torch.stack([linear(row[None])[0] for sample in x for row in sample]).view(4, 5, 16)
    assert torch.equal(whole, one_by_one)
    assert linear(x[:0]).shape == (0, 5, 16)


def test_linears_that_read_one_tensor_share_its_codes():
    shared = InputQuantizer(TOKEN)
    x = normal(3, 16)
    first = shared.integers(x)
    assert shared.integers(x) is first
    x.add_(1)
    assert shared.integers(x) is not first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_size_get_the_scales_and_codes_of_the_definition(dtype):
    tiny = torch.finfo(torch.float32).tiny
    sizes = torch.tensor([0, tiny / 2, 126.9 * tiny, 127 * tiny, 127.1 * tiny, 1e-20, 1, 6e4, 3e38])
    x = (torch.cat([normal(9, 7).clamp(-1, 1), torch.ones(9, 1)], 1) * sizes[:, None]).to(dtype)
    x = torch.cat([x[x.isfinite().all(1)], -x[:1]])
    rows, grid = integer_rows(x, TOKEN, None), dynamic_grid(x, TOKEN)
    assert torch.equal(rows.scale, grid.scale) and torch.equal(rows.codes, quantize(x, grid))


@pytest.mark.parametrize("spec", [TOKEN, STATIC])
def test_nan_spreads_to_its_row_and_equal_values_are_exact(spec):
    x = torch.full((3, 8), 2.0)
    linear = QuantLinear(torch.ones(4, 8), None, QuantSpec(bits=8), inputs_of(spec, x))
    linear.use_kernels(Choice())
    torch.testing.assert_close(linear(x), torch.full((3, 4), 16.0))
    x = x.clone()
    x[1, 3] = torch.nan
    assert linear(x).isnan().all(1).tolist() == [False, True, False]
    assert torch.equal(linear(torch.zeros(2, 8)), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("weight", "inputs", "why"),
    [
        (None, TOKEN, "the weight is in floating point"),
        (QuantSpec(bits=4), None, "the input is in floating point"),
        (QuantSpec(bits=4, format="nf4", granularity="group", group_size=64), TOKEN, "the weight's format, nf4"),
        (QuantSpec(bits=8), QuantSpec(bits=8, granularity="tensor", dynamic=True), "the input's dynamic scales are one a tensor"),
        (QuantSpec(bits=8), QuantSpec(bits=8, granularity="channel"), "the input's static scales are one a channel"),
    ],
)  # fmt: skip
def test_a_product_that_is_no_sum_of_integers_is_simulated_and_says_why(weight, inputs, why):
    choice = Choice()
    assert choice.multiplier(weight, inputs, (64, 64), CPU) is None
    assert choice.ran == {SIMULATED: 1}
    [reason] = choice.refused
    assert reason.startswith(why)
    assert f"1 simulated: {why}" in describe(choice.ran, choice.refused)


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    choice = Choice("onednn_int8")
    grouped = QuantSpec(bits=4, granularity="group", group_size=8)
    assert choice.candidates(grouped, TOKEN, (8, 16), CPU) == (
        [],
        "onednn_int8: it takes one scale a row of the weight, not groups",
    )
    assert choice.candidates(QuantSpec(bits=8), TOKEN, (8, 16), torch.device("meta"))[1].startswith(
        "onednn_int8: it runs on CPUs"
    )
    assert names()[:2] == ("auto", "simulated") and "int_mm" in names()


@pytest.mark.parametrize(
    ("weight", "inputs", "shape", "why"),
    [
        (QuantSpec(bits=4, granularity="group", group_size=8), TOKEN, (8, 16), "it takes one scale a row of the weight, not groups"),
        (QuantSpec(bits=8, symmetric=False), TOKEN, (8, 16), "it takes no zero points"),
        (QuantSpec(bits=8), STATIC, (8, 16), "it takes no zero points"),
    ],
)  # fmt: skip
def test_what_fbgemm_does_not_multiply_is_refused(weight, inputs, shape, why):
    assert registered()["fbgemm"].refusal(weight, inputs, shape, CPU) == why


def test_fbgemm_is_refused_where_torch_quantizes_by_another_engine(monkeypatch):
    monkeypatch.setattr("quantize.kernels.integers.fbgemm.ENGINES", ())
    found = registered()["fbgemm"].refusal(QuantSpec(bits=8), TOKEN, (8, 16), CPU)
    assert found == "torch's quantized Linear is not FBGEMM's here"


@pytest.mark.parametrize("name", ["fbgemm", "int_mm", "onednn_int8"])
@pytest.mark.parametrize("bits", [8, 7, 4])
def test_greatest_codes_in_long_rows_are_summed_without_loss(name, bits):
    refusal = registered()[name].refusal(QuantSpec(bits=bits), TOKEN, (16, 4096), CPU)
    if bits == 8 and refusal is not None and "VNNI" in refusal:
        pytest.skip("this processor's sums of 8 bits overflow, and the kernel is refused")
    assert refusal is None
    columns, greatest = 4096, 2 ** (bits - 1) - 1
    for code in (greatest, -greatest - 1):
        held = IntegerWeight(torch.full((16, columns), code, dtype=torch.int8), torch.ones(16, 1), None)
        taken = IntegerRows(torch.full((3, columns), 127, dtype=torch.int8), torch.ones(3, 1), None)
        taken.codes[1], taken.codes[2] = -127, -128
        expected = torch.tensor([127.0, -127.0, -128.0])[:, None].expand(3, 16) * code * columns
        assert torch.equal(registered()[name].prepare(held)(taken), expected)


def test_cuda_widths_that_are_no_multiples_of_eight_are_refused():
    kernel = registered()["int_mm"]
    cuda = torch.device("cuda")
    assert "must be multiples of 8" in kernel.refusal(QuantSpec(bits=8), TOKEN, (12, 64), cuda)
    assert kernel.refusal(QuantSpec(bits=8), TOKEN, (16, 64), cuda) is None


def test_the_fastest_is_found_once_for_a_shape_and_kept():
    choice, x = Choice(), normal(8, 64)
    linear = QuantLinear(normal(32, 64, seed=1), None, QuantSpec(bits=4), InputQuantizer(TOKEN))
    linear.use_kernels(choice)
    first = linear(x)
    [timings] = choice.timings.values()
    assert set(timings) == {"int_mm", "fbgemm", "onednn_int8"} and all(t >= 0 for t in timings.values())
    again = QuantLinear(normal(32, 64, seed=1), None, QuantSpec(bits=4), InputQuantizer(TOKEN))
    again.use_kernels(Choice(timings=choice.timings))
    assert again._multiplier.fastest(7) == min(timings, key=timings.get)
    assert torch.equal(again(x), first) and len(choice.timings) == 1
    assert again._multiplier.fastest(100) is None


def test_a_changed_or_moved_weight_is_packed_again():
    linear = QuantLinear(normal(16, 32), None, QuantSpec(bits=8), InputQuantizer(TOKEN))
    other = QuantLinear(normal(16, 32, seed=5), None, QuantSpec(bits=8), InputQuantizer(TOKEN))
    for module in (linear, other):
        module.use_kernels(Choice())
    x = normal(4, 32, seed=2)
    before = linear(x)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear(x), other(x)) and not torch.equal(linear(x), before)
    copied = copy.deepcopy(linear)
    assert torch.equal(copied(x), linear(x))
    assert torch.equal(linear.double()(x.double()).float(), other(x))


def test_a_kernel_of_ones_own_takes_part(monkeypatch):
    class Slow:
        name = "slow"
        held_bits = 0.0

        def refusal(self, weight, inputs, shape, device):
            return None if weight.bits == 8 else "8 bits only"

        def prepare(self, weight):
            return registered()["int_mm"].prepare(weight)

    monkeypatch.setattr("quantize.kernels.base._KERNELS", dict(registered()))
    register(Slow())
    choice = Choice("slow")
    assert [k.name for k in choice.candidates(QuantSpec(bits=8), TOKEN, (8, 8), CPU)[0]] == ["slow"]
    assert choice.candidates(QuantSpec(bits=4), TOKEN, (8, 8), CPU)[1] == "slow: 8 bits only"


def test_codes_of_the_simulation_are_what_the_integers_stand_for():
    x = normal(5, 16) * 3 + 1
    for spec in (TOKEN, STATIC, dataclasses.replace(TOKEN, symmetric=False, bits=4)):
        quantizer = inputs_of(spec, x)
        rows = integer_rows(x, spec, None if spec.dynamic else quantizer.grid)
        zero = 0 if rows.zero is None else rows.zero
        torch.testing.assert_close((rows.codes - zero) * rows.scale, quantizer(x))
    assert torch.equal(
        finish(torch.ones(5, 2), rows.scale, torch.ones(2), torch.float32), (rows.scale + 1).expand(5, 2)
    )
