"""Low-rank correction: against the whitened SVD in float64, against random corrections, and alternation that keeps the best."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import dequantize, fake_quantize
from quantize.grid.ranges import weight_grid
from quantize.solvers.gptq import GptqOptions, solve
from quantize.solvers.lowrank import corrected, low_rank_factors
from quantize.spec.quant_spec import QuantSpec
from tests.quantize.solvers.problems import losses, problem

SPEC = QuantSpec(bits=2, symmetric=False)


def rounded(weight):
    values = fake_quantize(weight, weight_grid(weight, SPEC))
    return values, values


def solved(hessian):
    def quantized(weight):
        solution = solve(weight, hessian, SPEC, GptqOptions(scales="pivots", descent=2))
        return dequantize(solution.codes, solution.grid), solution

    return quantized


def damped(hessian, damping):
    h = hessian.double().numpy()
    return h + damping * np.diag(h).mean() * np.eye(len(h))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(8, 24), (24, 24), (40, 24), (1, 5), (5, 1)]), st.integers(1, 30), st.integers(0, 2**31),
    st.integers(1, 60), st.sampled_from([0.01, 0.5]),
)  # fmt: skip
def test_it_is_the_truncated_svd_of_the_whitened_residual(shape, rank, seed, tokens, damping):
    residual, hessian = problem(*shape, tokens, seed)
    factors = low_rank_factors(residual, hessian, rank, damping)
    kept = min(rank, *shape)
    assert factors.left.shape == (shape[0], kept) and factors.right.shape == (kept, shape[1])
    h = damped(hessian, damping)
    root = np.linalg.cholesky(h)
    spectrum = np.linalg.svd(residual.double().numpy() @ root, compute_uv=False)
    d = residual.double().numpy() - factors.left.double().numpy() @ factors.right.double().numpy()
    left_over = np.einsum("ri,ij,rj->", d, h, d)
    assert left_over == pytest.approx((spectrum[kept:] ** 2).sum(), rel=1e-3, abs=1e-5 * (spectrum**2).sum())


def test_a_residual_of_that_rank_is_given_back_and_more_rank_never_costs():
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(12, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    _, hessian = problem()
    torch.testing.assert_close(low_rank_factors(residual, hessian, 3).product(), residual, rtol=1e-3, atol=1e-3)
    weight, _ = problem(seed=5)
    found = [losses(weight, low_rank_factors(weight, hessian, r, 1e-6).product(), hessian).sum() for r in range(1, 13)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(found)) and found[-1] < 1e-4 * found[0]


def test_both_factors_are_alike_in_size_and_their_bits_are_counted():
    weight, hessian = problem(40, 24)
    factors = low_rank_factors(weight, hessian * 1e6, 4, dtype=torch.float16)
    assert factors.bits == 16 * 4 * (40 + 24)
    ratio = factors.left.float().norm(dim=0) / factors.right.float().norm(dim=1)
    torch.testing.assert_close(ratio, torch.ones(4), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_losses_are_those_of_what_is_kept_and_the_best_round_is_kept(dtype, rounds):
    weight, hessian = problem(24, 48, 400)
    found = corrected(weight.to(dtype), hessian, 4, solved(hessian), rounds, dtype=dtype)
    solution, factors = found.solution, found.factors
    values = dequantize(solution.codes, solution.grid) + factors.product()
    assert factors.left.dtype == factors.right.dtype == dtype and len(found.losses) == rounds + 1
    expected = losses(weight.to(dtype), values, hessian).mean() / 2
    assert expected == pytest.approx(min(found.losses[1:]), rel=1e-3)
    assert min(found.losses[1:]) < 0.9 * found.losses[0]


def test_alternation_gains_over_one_round_and_is_the_same_twice():
    weight, hessian = problem(24, 48, 400)
    once, often, again = (corrected(weight, hessian, 4, rounded, n) for n in (1, 6, 6))
    assert often.losses[:2] == once.losses and min(often.losses[1:]) < once.losses[1]
    assert torch.equal(often.factors.left, again.factors.left) and torch.equal(often.solution, again.solution)


def test_what_makes_no_sense_is_refused():
    weight, hessian = problem()
    with pytest.raises(ValueError, match="hessian: shape"):
        low_rank_factors(weight, hessian[:5, :5], 2)
    with pytest.raises(ValueError, match="rank, damping: 0"):
        low_rank_factors(weight, hessian, 0)
    with pytest.raises(ValueError, match="NaN or inf"):
        low_rank_factors(weight * torch.inf, hessian, 2)
    with pytest.raises(ValueError, match="not positive definite"):
        low_rank_factors(weight.t(), torch.ones(12, 12) * 3 - 2 * torch.eye(12) * 5, 2)
    with pytest.raises(ValueError, match="rounds: 0"):
        corrected(weight, hessian, 2, rounded, 0)


def test_no_residual_and_no_tokens_give_no_correction():
    weight, hessian = problem()
    assert (low_rank_factors(weight * 0, hessian, 3).product() == 0).all()
    factors = low_rank_factors(weight, hessian * 0, 12)  # Every column counts alike.
    torch.testing.assert_close(factors.product(), weight, rtol=1e-3, atol=1e-3)
