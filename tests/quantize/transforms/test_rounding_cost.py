"""The estimate of what rounding costs, against rounding itself; maps and rotations that are learned on it."""

import pytest
import torch

from quantize.grid.affine import dequantize, grouped
from quantize.modules.simulated import fake_quantize_dynamic
from quantize.solvers.gptq import GptqOptions, Hessian, solve
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.affine import affine_from_scale, cost_of, learned_affine
from quantize.transforms.hadamard import hadamard_matrix
from quantize.transforms.learned_rotation import LOSSES, STEPS, learned_rotation, rotation_loss
from quantize.transforms.orthogonal import random_orthogonal
from quantize.transforms.rounding_cost import RoundingCost
from quantize.transforms.wush import wush
from tests.quantize.transforms.matrices import orthogonality_error

TOKEN = QuantSpec(4, granularity="token", dynamic=True)
GROUP = QuantSpec(4, granularity="group", group_size=16, symmetric=False, dynamic=True)
ROWS = QuantSpec(4)
WIDTH = 64


def problem(seed=0, tokens=1024, out=96):
    """Tokens with correlated channels, some outlying, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(1.5 * torch.randn(WIDTH, generator=generator))
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 8 + torch.eye(WIDTH)
    rows = torch.randn(tokens, WIDTH, generator=generator) * scale @ mixing
    return rows, rows.t() @ rows / tokens, torch.randn(out, WIDTH, generator=generator)


@pytest.mark.parametrize("spec", [TOKEN, GROUP], ids=["token", "group"])
def test_the_cost_of_an_input_behind_a_mixing_map_is_the_error_that_rounding_leaves(spec):
    rows, hessian, weight = problem()
    turn = hadamard_matrix(WIDTH).float()
    cost = RoundingCost.of(rows, hessian, weight, spec, None)
    mixed, reads = rows @ turn, weight @ turn
    error = ((fake_quantize_dynamic(mixed, spec) - mixed) @ reads.t()).square().sum() / (
        rows @ weight.t()
    ).square().sum()
    assert float(cost(mixed, reads, torch.zeros(()))) == pytest.approx(float(error), rel=0.15)


def test_the_cost_of_a_weight_lies_nearer_to_what_gptq_leaves_than_to_what_rounding_to_nearest_does():
    rows, hessian, weight = problem(tokens=4096)
    turn = hadamard_matrix(WIDTH).float()
    cost = float(RoundingCost.of(rows, hessian, weight, None, ROWS)(rows @ turn, weight @ turn, torch.zeros(())))
    moments = Hessian(WIDTH)
    moments.update(rows @ turn)
    solution = solve(weight @ turn, moments.matrix, ROWS, GptqOptions())
    codes = dequantize(grouped(solution.codes, ROWS), solution.grid).reshape(weight.shape)
    error = float(((weight @ turn - codes) @ (rows @ turn).t()).square().sum() / (rows @ weight.t()).square().sum())
    nearest = float(
        ((weight @ turn).abs().amax(1) / 7).square().sum() / 12 * hessian.trace() / (weight @ hessian * weight).sum()
    )
    assert 0.7 * error < cost < 3 * error
    assert cost < 0.5 * nearest


@pytest.mark.parametrize("number", [0.03, 7.0])
def test_the_cost_does_not_see_a_number_that_the_map_is_multiplied_by(number):
    rows, hessian, weight = problem()
    cost = RoundingCost.of(rows, hessian, weight, TOKEN, ROWS)
    plain = cost(rows, weight, torch.zeros(()))
    scaled = cost(rows * number, weight / number, WIDTH * torch.tensor(number).log())
    assert float(scaled) == pytest.approx(float(plain), rel=1e-4)


def test_the_closed_form_costs_an_input_less_than_a_hadamard_matrix():
    rows, hessian, weight = problem()
    cost = RoundingCost.of(rows, hessian, weight, TOKEN, None)
    turn = hadamard_matrix(WIDTH).float()
    pair = wush(hessian, weight.double().t() @ weight.double())
    left, right = pair.activation[0].float(), torch.linalg.inv(pair.activation[0]).t().float()
    plain = float(cost(rows @ turn, weight @ turn, torch.zeros(())))
    assert float(cost(rows @ left, weight @ right, torch.linalg.slogdet(pair.activation[0]).logabsdet)) < 0.8 * plain


def test_learning_lowers_the_cost_keeps_the_map_invertible_and_begins_where_it_is_told():
    rows, hessian, weight = problem()
    cost = RoundingCost.of(rows, hessian, weight, TOKEN, ROWS)
    start = affine_from_scale(torch.ones(WIDTH), "hadamard")
    _, before, after = learned_affine(start, cost, steps=0)
    assert before == after == pytest.approx(float(cost_of(start, cost)), rel=1e-4)
    learned, before, after = learned_affine(start, cost, steps=40)
    assert after < 0.8 * before
    assert float(cost_of(learned, cost)) == pytest.approx(after, rel=1e-3)
    dense = torch.kron(learned.left, learned.right) / learned.diagonal[:, None]
    assert torch.allclose(learned(rows), rows @ dense, atol=1e-3)
    for wrong in ({"steps": -1}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="is not valid"):
            learned_affine(start, cost, **wrong)


def test_a_hessian_that_says_nothing_is_refused():
    rows, hessian, weight = problem()
    for bad in (torch.zeros_like(hessian), hessian * float("nan")):
        with pytest.raises(ValueError, match="hessian: zero, or holds NaN or inf"):
            RoundingCost.of(rows, bad, weight, TOKEN, ROWS)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", STEPS)
def test_a_rotation_finds_the_basis_in_which_tokens_are_flat(loss, kind):
    width = 16
    signs = torch.randn(800, width, generator=torch.Generator().manual_seed(1)).sign()
    # Every value is 1 or -1 in one basis only, and looks normal in all others.
    hidden = signs @ random_orthogonal(width, 2).float()
    found, before, after = learned_rotation(hidden, torch.eye(width).double(), loss, kind, steps=80)
    assert after < before
    assert float(rotation_loss(hidden @ found.float(), "range")) < 0.5 * float(rotation_loss(hidden, "range"))
    assert float(orthogonality_error(found)) < 1e-12


def test_the_range_of_groups_and_of_zero_points_is_that_of_the_format():
    rows = torch.tensor([[0.0, 2.0, -8.0, 0.0]])
    assert float(rotation_loss(rows, "range")) == 64
    groups = QuantSpec(4, granularity="group", group_size=2, symmetric=False, dynamic=True)
    assert float(rotation_loss(rows, "range", groups)) == pytest.approx((1 + 16) / 2)
    for wrong, words in (
        ({"kind": "caley"}, "kind: "),
        ({"loss": "whipp", "rows": torch.ones(8, 4)}, "loss: "),
        ({}, "with 1 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            learned_rotation(**{"rows": rows, "start": torch.eye(4), **wrong})
