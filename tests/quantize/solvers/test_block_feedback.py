"""GPTQ by columns of tiles: less output error than rounding to nearest, the errors that are carried, what is refused."""

import pytest
import torch

from quantize.codecs.registry import codec_of
from quantize.solvers.factorisation import factorise
from quantize.solvers.gptq import GptqOptions, quantized_weights, solve, solve_format
from quantize.solvers.tiles.block_feedback import block_factor, code_with_feedback
from quantize.spec.quant_spec import QuantSpec, spec_of
from tests.quantize.solvers.problems import losses, problem

SPEC = spec_of("trellis")


def decoded(stored, shape):
    return codec_of(SPEC).decode(stored, SPEC, shape)


@pytest.mark.parametrize("act_order", [False, True])
def test_on_correlated_inputs_it_loses_less_than_rounding_to_nearest_and_than_levels_of_more_bits(act_order):
    weight, hessian = problem(32, 96, 500)
    solution = solve_format(weight, hessian, SPEC, GptqOptions(act_order=act_order))
    layout = codec_of(SPEC).layout(weight.shape, SPEC)
    assert {n: (tuple(t.shape), t.dtype) for n, t in solution.stored.items()} == layout
    mine = losses(weight, decoded(solution.stored, weight.shape), hessian)
    nearest = losses(weight, codec_of(SPEC).fake(weight, SPEC), hessian)
    assert solution.loss == pytest.approx(mine.mean() / 2, rel=1e-3)
    assert solution.rtn_loss == pytest.approx(nearest.mean() / 2, rel=1e-3)
    assert solution.loss < 0.7 * solution.rtn_loss and solution.rtn_rows == 0
    integers = QuantSpec(bits=2, granularity="group", group_size=32, symmetric=False)
    scalar = solve(weight, hessian, integers, GptqOptions(act_order=act_order, scales="pivots", descent=2))
    assert solution.loss < 0.8 * scalar.loss


def test_the_blocks_factor_is_that_of_the_damped_hessian():
    """H = B^-1 diag(S^-1 p S^-T) B^-T, B with identities on its diagonal of blocks: what is carried and what is lost for good."""
    _, hessian = problem(4, 48, 300)
    factor = factorise(hessian, 0.01, False)
    shares, costs = block_factor(factor)
    blocks = torch.arange(48) // 16
    b = torch.where(blocks[:, None] < blocks, shares, torch.zeros_like(shares)).double() + torch.eye(
        48, dtype=torch.double
    )
    middle = b @ factor.damped(hessian).double() @ b.t()
    inside = blocks[:, None] == blocks
    assert middle[~inside].abs().max() < 1e-4 * middle.diagonal().max()
    assert torch.allclose(middle.diagonal().float(), costs, rtol=1e-3)


def test_without_correlations_it_is_the_search_of_each_tile_with_the_best_scale_of_a_row():
    weight, _ = problem(16, 32)
    stored = code_with_feedback(weight, torch.eye(32), factorise(torch.eye(32), 0.01, False), SPEC)
    plain = codec_of(SPEC).encode(weight, SPEC)
    assert torch.equal(stored["codes"], plain["codes"])
    assert torch.allclose(stored["scale"], plain["scale"], rtol=1e-5)


def test_no_weight_loses_more_than_with_rounding_to_nearest_and_unused_columns_are_no_failure():
    weight, hessian = problem(20, 48, 3, seed=1)
    hessian[5], hessian[:, 5] = 0, 0
    solution = solve_format(weight, hessian, SPEC, GptqOptions())
    assert solution.loss <= solution.rtn_loss and not solution.fallback
    nothing = solve_format(weight, torch.zeros(48, 48), SPEC, GptqOptions())
    assert nothing.fallback and nothing.rtn_rows == 20
    assert torch.equal(decoded(nothing.stored, weight.shape), codec_of(SPEC).fake(weight, SPEC))


def test_weights_one_below_the_other_are_coded_as_each_by_itself():
    weight, hessian = problem(48, 64, 300)
    whole = solve_format(weight, hessian, SPEC, GptqOptions()).stored
    for rows in (slice(0, 16), slice(16, 48)):
        part = solve_format(weight[rows], hessian, SPEC, GptqOptions()).stored
        tiles = slice(rows.start // 16, rows.stop // 16)
        assert torch.equal(whole["codes"][tiles], part["codes"])
        assert torch.allclose(whole["scale"][rows], part["scale"], rtol=1e-5)


def test_it_shares_a_call_with_formats_of_single_columns():
    weight, hessian = problem(16, 64, 300)
    found = quantized_weights(weight, hessian, {"trellis": SPEC, "int": QuantSpec(bits=2)}, GptqOptions())
    assert losses(weight, found["trellis"], hessian).sum() < losses(weight, found["int"], hessian).sum()


@pytest.mark.parametrize(
    ("options", "name"), [({"scales": "pivots"}, "scales: 'pivots'"), ({"descent": 2}, "descent: 2")]
)
def test_options_that_need_levels_are_refused_by_name(options, name):
    weight, hessian = problem(16, 32)
    with pytest.raises(ValueError, match=f"^{name} needs levels, and format 'trellis' has none: use"):
        solve_format(weight, hessian, SPEC, GptqOptions(**options))
