"""The quantized Linear: one definition with its stored codes, shared inputs, honest sizes."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import linear

import quantize.modules.simulated
from quantize.grid.affine import Grid, dequantize, grouped
from quantize.modules.simulated import InputQuantizer, QuantLinear, fake_quantize_dynamic
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, SpecError, spec_of

TOKEN = QuantSpec(granularity="token", dynamic=True)


def _weight(rows=12, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 8)])
def test_the_stored_codes_and_scales_alone_give_the_weight_that_is_computed_with(bits, symmetric, granularity, size):
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, group_size=size)
    module = QuantLinear(_weight(), None, spec)
    state = module.state_dict()
    assert "weight" not in state
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    grid = Grid(state["scale"], state.get("zero_point"), low, high)
    weight = dequantize(grouped(state["codes"], spec), grid).view(12, 32)
    assert torch.equal(weight, module.weight)


def test_integer_arithmetic_gives_what_the_simulation_gives():
    weight, x = _weight(), _weight(5, 32, seed=1)
    module = QuantLinear(weight, torch.ones(12), QuantSpec(), InputQuantizer(TOKEN))
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / scale).round().to(torch.int64)
    integers = codes @ module.codes.to(torch.int64).t()
    expected = integers.double() * scale.double() * module.scale.double().t() + 1
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_linears_that_read_one_tensor_round_it_once(monkeypatch):
    calls = []
    original = fake_quantize_dynamic
    monkeypatch.setattr(
        quantize.modules.simulated, "fake_quantize_dynamic", lambda x, spec: (calls.append(1), original(x, spec))[1]
    )
    inputs = InputQuantizer(TOKEN)
    modules = [QuantLinear(_weight(seed=i), None, QuantSpec(), inputs) for i in range(3)]
    x = _weight(4, 32, seed=9)
    outputs = [m(x) for m in modules]
    assert len(calls) == 1
    for module, output in zip(modules, outputs, strict=True):
        torch.testing.assert_close(output, linear(original(x, TOKEN), module.weight))


def test_an_input_changed_in_place_is_rounded_again():
    inputs = InputQuantizer(TOKEN)
    x = _weight(4, 32)
    first = inputs(x).clone()
    x.mul_(3)
    torch.testing.assert_close(inputs(x), first * 3)


def test_nothing_is_kept_once_the_input_is_gone():
    inputs = InputQuantizer(TOKEN)
    x = _weight(4, 32)
    inputs(x)
    assert inputs._last is not None
    del x
    assert inputs._last is None
    assert copy.deepcopy(inputs).spec == TOKEN


def test_static_inputs_saturate_outside_their_calibrated_range():
    ranges = torch.full((4,), -1.0), torch.full((4,), 1.0)
    inputs = InputQuantizer(QuantSpec(granularity="tensor"), ranges)
    assert inputs(torch.tensor([[5.0, 0.5, -7.0, 1.0]])).tolist()[0][0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="statistics"):
        InputQuantizer(QuantSpec(granularity="tensor"))


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec(bits=8), 8 + 32 / 64),
        (QuantSpec(bits=4, granularity="group", group_size=16), 4 + 32 / 16),
        (QuantSpec(bits=4, granularity="group", group_size=16, symmetric=False), 4 + 36 / 16),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(spec, bits):
    assert QuantLinear(_weight(16, 64), None, spec).bits_per_weight() == pytest.approx(bits)


def test_scales_of_clusters_count_and_so_does_which_cluster_a_column_is_in():
    labels = torch.arange(64) % 4
    linear = QuantLinear(_weight(16, 64), None, QuantSpec(bits=4, granularity="cluster"), labels=labels)
    # A scale of each of 4 clusters a row, 32 bits, and 16 bits a column.
    assert linear.bits_per_weight() == pytest.approx(4 + (32 * 4 * 16 + 16 * 64) / (16 * 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = _weight()
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        QuantLinear(weight, None, QuantSpec())


def test_codes_chosen_by_a_solver_are_kept():
    weight = _weight()
    nearest = QuantLinear(weight, None, QuantSpec(bits=4))
    grid = Grid(nearest.scale, None, -7, 7)
    codes = torch.zeros_like(nearest.codes)
    chosen = QuantLinear(weight, None, QuantSpec(bits=4), grid=grid, codes=codes)
    assert chosen.weight.abs().sum() == 0 and torch.equal(chosen.codes, codes)


DYNAMIC = [
    QuantSpec(bits=4, granularity="tensor", dynamic=True),
    QuantSpec(bits=4, granularity="tensor", symmetric=False, dynamic=True),
    QuantSpec(bits=4, granularity="tensor", dynamic=True, range="percentile", percentile=99.0),
    QuantSpec(bits=4, granularity="tensor", dynamic=True, range="mse"),
    TOKEN,
    QuantSpec(granularity="group", group_size=16, dynamic=True),
    *(spec_of(name, activation=True) for name in formats() if name != "int" and formats()[name].activation),
    spec_of("fp8_e4m3", activation=True, granularity="tensor"),
]


@pytest.mark.parametrize("spec", DYNAMIC, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 64), (5, 2, 7, 64)])
def test_what_a_sample_is_rounded_to_does_not_depend_on_the_samples_beside_it(spec, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * torch.tensor([1, 9, 0.1, 3, 70.0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    alone = torch.cat([fake_quantize_dynamic(sample, spec) for sample in x.split(1)])
    for size in (2, 3, 5):
        together = torch.cat([fake_quantize_dynamic(batch, spec) for batch in x.split(size)])
        assert torch.equal(together, alone)
    if len(shape) == 3:
        assert torch.equal(alone[0], fake_quantize_dynamic(x[0], spec))


@pytest.mark.parametrize("spec", DYNAMIC, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (2, 0, 64)])
def test_no_tokens_are_rounded_to_no_tokens(spec, shape):
    assert fake_quantize_dynamic(torch.empty(shape), spec).shape == shape
    assert InputQuantizer(spec)(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_a_static_scale_of_fp8_is_that_of_the_statistics_and_what_is_beyond_saturates(name):
    spec = spec_of(name, activation=True, granularity="tensor", dynamic=False)
    seen = _weight(50, 8, seed=1)
    quantizer = InputQuantizer(spec, (seen.amin(0), seen.amax(0)))
    kind = getattr(torch, "float8_e4m3fn" if name == "fp8_e4m3" else "float8_e5m2")
    scale = seen.abs().max() / torch.finfo(kind).max
    assert torch.equal(quantizer.scale, scale.reshape(1))
    x = seen[:4].clone()
    x[0, 0], x[1, 1] = 100 * seen.abs().max(), torch.nan
    found = quantizer(x)
    assert found[0, 0] == seen.abs().max() and found[1, 1].isnan()
    inside = torch.ones_like(x, dtype=torch.bool)
    inside[0, 0] = inside[1, 1] = False
    assert torch.equal(found[inside], ((x / scale).to(kind).float() * scale)[inside])
    again = InputQuantizer.from_stored(spec, *quantizer.limits, quantizer.scale)
    assert torch.equal(again(seen), quantizer(seen)) and quantizer(seen.bfloat16()).dtype == torch.bfloat16
    assert not InputQuantizer(spec, (torch.zeros(8), torch.zeros(8)))(torch.zeros(2, 8)).any()
    for wrong in ("token", "channel"):
        with pytest.raises(SpecError, match="tensor with format"):
            dataclasses.replace(spec, granularity=wrong).check_activation()
    with pytest.raises(SpecError, match="true with format mxfp4"):
        spec_of("mxfp4", activation=True, dynamic=False).check_activation()


def test_static_nvfp4_inputs_are_rounded_token_by_token_under_the_scale_of_the_statistics():
    spec = spec_of("nvfp4", activation=True, dynamic=False)
    seen = _weight(50, 32, seed=1)
    quantizer = InputQuantizer(spec, (seen.amin(0), seen.amax(0)))
    assert torch.equal(quantizer.scale, (seen.abs().max() / (6 * 448)).reshape(1))
    # The statistics' own tokens are rounded as one dynamic call over all of them rounds them, and each alone likewise.
    assert torch.equal(quantizer(seen), fake_quantize_dynamic(seen, spec_of("nvfp4", activation=True)))
    assert torch.equal(torch.cat([quantizer(token[None]) for token in seen]), quantizer(seen))
    x = seen[:4].clone()
    x[0, 3], x[1, 17] = -100 * seen.abs().max(), torch.nan
    found = quantizer(x)
    assert found[0, 3] == -6 * 448 * quantizer.scale and found[1, 16:].isnan().all()
    assert torch.equal(found[2:], quantizer(seen)[2:4]) and torch.equal(found[1, :16], quantizer(seen)[1, :16])
    again = InputQuantizer.from_stored(spec, *quantizer.limits, quantizer.scale)
    assert torch.equal(again(seen), quantizer(seen)) and quantizer(seen.bfloat16()).dtype == torch.bfloat16
    assert not InputQuantizer(spec, (torch.zeros(32), torch.zeros(32)))(torch.zeros(2, 32)).any()
