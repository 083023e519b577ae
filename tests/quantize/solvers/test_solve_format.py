"""GPTQ on formats of levels and scales: what it chooses is what the codec stores, and better than rounding to nearest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.codecs.registry import codec_of
from quantize.solvers.clip import clipped_levels
from quantize.solvers.gptq import SCALES, GptqOptions, solve, solve_format
from quantize.solvers.levels import absmax_scale, level_form
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.solvers.problems import losses, problem

SPECS = {
    "nf4": spec_of("nf4", group_size=32),
    "nf4 double": spec_of("nf4", double_quant=True),
    "fp4": spec_of("fp4", group_size=16),
    "mxfp4": spec_of("mxfp4"),
    "mxfp8": spec_of("mxfp8"),
    "mxfp8_e5m2": spec_of("mxfp8_e5m2"),
    "nvfp4": spec_of("nvfp4"),
    "nvfp4 power of two": spec_of("nvfp4", scales="power_of_two"),
    "fp8 channel": spec_of("fp8_e4m3"),
    "fp8 tensor": spec_of("fp8_e4m3", granularity="tensor"),
    "fp8 group": spec_of("fp8_e5m2", granularity="group", group_size=16),
}
every_format = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
every_fit = pytest.mark.parametrize("scales", SCALES)


def decoded(solution, spec, shape):
    return codec_of(spec).decode(solution.stored, spec, shape)


def nearest(weight, spec):
    codec = codec_of(spec)
    return codec.decode(codec.encode(weight, spec), spec, weight.shape)


@every_format
@every_fit
@pytest.mark.parametrize("descent", [0, 2])
def test_the_loss_is_that_of_what_the_codec_decodes_and_below_rounding_to_nearest(spec, scales, descent):
    weight, hessian = problem(24, 64, 500)
    solution = solve_format(weight, hessian, spec, GptqOptions(scales=scales, descent=descent))
    values = decoded(solution, spec, weight.shape)
    layout = codec_of(spec).layout(weight.shape, spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in solution.stored.items()} == layout
    mine, rtn = losses(weight, values, hessian), losses(weight, nearest(weight, spec), hessian)
    assert solution.loss == pytest.approx(mine.mean() / 2, rel=1e-3)
    assert solution.rtn_loss == pytest.approx(rtn.mean() / 2, rel=1e-3)
    assert solution.loss < 0.8 * solution.rtn_loss and solution.rtn_rows < 3
    assert not solution.fallback and solution.failures == 0


@every_format
def test_with_an_identity_hessian_and_the_formats_own_scales_it_is_rounding_to_nearest(spec):
    weight, _ = problem(6, 64)
    solution = solve_format(weight, torch.eye(64), spec, GptqOptions())
    values = decoded(solution, spec, weight.shape)
    if spec.double_quant:  # Codes follow the scales that are stored, which the codec's do not.
        assert solution.loss <= solution.rtn_loss
    else:
        assert torch.equal(values, nearest(weight, spec))


@every_format
def test_the_columns_that_are_left_see_the_values_that_are_stored(spec):
    """One column is rounded; the other's level must be the best given what the first one decodes to."""
    weight, hessian = problem(5, 64, 300)
    options = GptqOptions(act_order=False, damping=1e-4, scales="diagonal")
    values = decoded(solve_format(weight, hessian, spec, options), spec, weight.shape).double()
    if spec.format == "mxfp8_e5m2" or spec.double_quant:
        return
    h = hessian.double().numpy()
    # What the last column should be, given all others: the minimum of the quadratic. No stored level lies nearer.
    rest = (weight.double() - values).numpy()[:, :-1]
    wanted = weight.double().numpy()[:, -1] + rest @ h[:-1, -1] / h[-1, -1]
    levels = clipped_levels(weight, spec, hessian.diagonal())
    out = torch.empty(5)
    scale = levels.round(len(levels.scale) - 1, torch.from_numpy(wanted).float(), out)
    same = (np.abs((out * scale).numpy() - values.numpy()[:, -1]) < 1e-6).sum()
    assert same >= 4


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 80),
    st.integers(0, 2**31),
    st.sampled_from(sorted(SPECS)),
    st.sampled_from(SCALES),
    st.integers(0, 2),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_no_row_loses_more_than_with_rounding_to_nearest(rows, tokens, seed, name, scales, descent, size, dtype):
    spec = SPECS[name]
    weight, hessian = problem(rows, 64, tokens, seed)
    weight = (weight * size).to(dtype)
    solution = solve_format(weight, hessian, spec, GptqOptions(scales=scales, descent=descent))
    values = decoded(solution, spec, weight.shape)
    mine, rtn = losses(weight, values, hessian), losses(weight, nearest(weight.float(), spec), hessian)
    slack = 1e-5 * losses(weight, torch.zeros(rows, 64), hessian)
    if spec.granularity == "tensor" or spec.double_quant:
        mine, rtn, slack = mine.sum(), rtn.sum(), slack.sum()
    assert (mine <= rtn + slack).all()


@every_format
def test_all_zero_weights_and_blocks_of_zeros_stay_zero(spec):
    weight, hessian = problem(4, 128)
    weight[:, :64] = 0
    weight[1] = 0
    hessian = torch.diag(hessian.diagonal())
    values = decoded(solve_format(weight, hessian, spec, GptqOptions(scales="pivots", descent=1)), spec, weight.shape)
    if not spec.double_quant:
        assert (values[:, :64] == 0).all()
    assert (values[1] == 0).all() and torch.isfinite(values).all() and values.any()


@every_format
def test_the_form_gives_the_codecs_own_scales_and_values(spec):
    weight, _ = problem(6, 64)
    form = level_form(spec, weight.abs().amax())
    scale = absmax_scale(weight, spec, form)
    mine, theirs = form.stored_scales(scale), codec_of(spec).quantize(weight, spec)
    for name, tensor in mine.items():
        assert torch.equal(tensor.float(), theirs[name].float()), name
    grid = torch.linspace(-2 * form.greatest, 2 * form.greatest, 999)
    levels = form.nearest(grid)
    assert torch.equal(form.nearest(levels), levels) and levels.max() == form.greatest
    assert ((grid - levels).abs() <= (grid[:, None] - levels.unique()[None]).abs().amin(1) * (1 + 1e-6) + 1e-6).all()


def test_a_fitted_scale_is_stored_as_the_power_of_two_nearest_by_ratio():
    form = level_form(SPECS["mxfp4"], torch.ones(1))
    exponents = np.linspace(-20, 20, 997)
    stored = form.scales(form.stored_scales(torch.from_numpy(2**exponents).float()))
    np.testing.assert_array_equal(stored, 2 ** np.round(exponents))


@every_format
def test_the_same_problem_gives_the_same_bits_twice(spec):
    weight, hessian = problem(8, 64)
    first, second = (
        solve_format(weight, hessian, spec, GptqOptions(scales="pivots", descent=2)).stored for _ in range(2)
    )
    assert all(torch.equal(first[n].float(), second[n].float()) for n in first)


def test_formats_that_it_cannot_solve_are_refused_by_name():
    weight, hessian = problem()
    with pytest.raises(ValueError, match="format: 'int' is an integer grid: use solve"):
        solve_format(weight, hessian, QuantSpec(), GptqOptions())
    with pytest.raises(ValueError, match="format: 'nf4' is no integer grid: use solve_format"):
        solve(weight, hessian, SPECS["nf4"], GptqOptions())
    with pytest.raises(ValueError, match="format: 'llm_int8' has no levels"):
        solve_format(weight, hessian, spec_of("llm_int8"), GptqOptions())


def test_a_factorisation_that_fails_is_counted_and_rounded_to_nearest_at_last():
    weight = torch.tensor([[0.3, -1.0] * 32])
    hessian = torch.ones(64, 64) * 100 + torch.eye(64) * -99
    hessian[0, 1] = hessian[1, 0] = 1e6
    solution = solve_format(weight, hessian, SPECS["nvfp4"], GptqOptions())
    assert solution.fallback and solution.failures == 4 and solution.damping == pytest.approx(10)
    assert torch.equal(decoded(solution, SPECS["nvfp4"], (1, 64)), nearest(weight, SPECS["nvfp4"]))
