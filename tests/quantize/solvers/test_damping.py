"""The factor of a Hessian and its damping: reconstruction in float64, failures that are counted, the choice on held-out tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import dequantize
from quantize.solvers.damping import held_out_damping
from quantize.solvers.factorisation import Factor, Failure, factorise
from quantize.solvers.gptq import GptqOptions, Hessian, solve
from quantize.spec.quant_spec import QuantSpec
from tests.quantize.solvers.problems import losses, problem


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 80), st.integers(0, 2**31), st.booleans(), st.sampled_from([0.01, 0.3]))
def test_the_factor_gives_the_damped_hessian_back_and_its_pivots_are_the_conditional_diagonal(
    size, tokens, seed, act_order, damping
):
    _, hessian = problem(1, size, tokens, seed)
    factor = factorise(hessian, damping, act_order)
    assert isinstance(factor, Factor) and factor.failures == 0 and factor.damping == damping
    order = factor.order.numpy()
    h = hessian.double().numpy()[order][:, order] / hessian.diagonal().double().mean().item() + damping * np.eye(size)
    inverse = np.linalg.inv(factor.triangle.double().numpy())
    np.testing.assert_allclose(inverse @ np.diag(factor.pivots.double().numpy()) @ inverse.T, h, atol=1e-3 * h.max())
    # The cost of an error in column j, once all later columns have made up for it: a Schur complement.
    for j in {0, size // 2, size - 1}:
        later = slice(j + 1, size)
        schur = h[j, j] - (h[j, later] @ np.linalg.solve(h[later, later], h[later, j]) if j + 1 < size else 0)
        assert factor.pivots[j] == pytest.approx(schur, rel=2e-2, abs=1e-4 * h.max())
    np.testing.assert_allclose(factor.damped(hessian).numpy()[order][:, order], h, rtol=1e-4, atol=1e-5)


def test_failures_are_counted_and_the_damping_that_worked_is_said():
    slightly, hopelessly = (torch.tensor([[1.0, c], [c, 1.0]]) for c in (1.05, 100.0))
    found = factorise(slightly, 0.01, True)
    assert isinstance(found, Factor) and found.failures == 1 and found.damping == pytest.approx(0.1)
    assert factorise(hopelessly, 0.01, True) == Failure(pytest.approx(10.0), 4)
    assert factorise(torch.zeros(3, 3), 0.01, True) == Failure(0.01, 0)
    weight = torch.tensor([[0.3, -1.0], [1.0, 0.2]])
    solutions = [solve(weight, h, QuantSpec(4), GptqOptions()) for h in (torch.eye(2), slightly, hopelessly)]
    assert [s.failures for s in solutions] == [0, 1, 4] and [s.fallback for s in solutions] == [False, False, True]


def two_halves(columns=48, tokens=60):
    """Few tokens of the same text, twice."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    halves = []
    for _ in range(2):
        hessian = Hessian(columns)
        hessian.update(torch.randn(tokens, columns, generator=generator) @ mix)
        halves.append(hessian.matrix)
    return torch.randn(64, columns, generator=generator), *halves


def test_the_damping_with_the_least_loss_on_the_held_out_tokens_is_chosen():
    weight, seen, held = two_halves()
    spec = QuantSpec(bits=3)

    def quantized(options):
        solution = solve(weight, seen, spec, options)
        return dequantize(solution.codes, solution.grid)

    dampings = (0.001, 0.01, 0.1, 0.5, 1.0)
    chosen = held_out_damping(weight, held, quantized, GptqOptions(), dampings)
    expected = [losses(weight, quantized(GptqOptions(damping=d)), held).mean() / 2 for d in dampings]
    np.testing.assert_allclose(chosen.losses, expected, rtol=1e-3)
    assert chosen.damping == dampings[int(np.argmin(expected))]
    # With hardly more tokens than channels the usual damping trusts them too much.
    assert chosen.damping > 0.01 and min(chosen.losses) < 0.95 * chosen.losses[1]
    assert held_out_damping(weight, seen, quantized, GptqOptions(), dampings).damping <= chosen.damping


def test_of_dampings_with_the_same_loss_the_smallest_is_chosen_whatever_their_order():
    weight, _, held = two_halves()
    for dampings in ((0.01, 0.1, 1.0), (1.0, 0.01, 0.1)):
        assert held_out_damping(weight, held, lambda o: weight + 1, GptqOptions(), dampings).damping == 0.01


def test_what_does_not_fit_is_refused():
    weight, _, held = two_halves()
    with pytest.raises(ValueError, match=r"held: shape \(5, 5\) does not fit"):
        held_out_damping(weight, held[:5, :5], lambda o: weight, GptqOptions())
    with pytest.raises(ValueError, match="dampings: expected"):
        held_out_damping(weight, held, lambda o: weight, GptqOptions(), ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": "mse"}, "scales: 'mse' is not valid.*use range"),
        ({"scales": "pivots", "static_groups": False}, "scales: 'pivots' are fitted first: use static_groups true"),
        ({"descent": -1}, "descent: -1 is not valid.*use 0"),
    ],
)
def test_an_option_that_has_no_effect_with_the_others_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GptqOptions(**change)
