"""The weight that makes up for an error, against numpy's least squares."""

import numpy as np
import pytest
import torch

from quantize.solvers.correction import (
    STRENGTHS,
    ErrorMoment,
    corrected_weight,
    damped_factor,
    held_out_strength,
    told_by_input,
)
from quantize.solvers.gptq import Hessian


def _inputs(tokens=400, channels=12, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator)
    y = x + noise * torch.randn(tokens, channels, generator=generator)
    return x, y, torch.randn(7, channels, generator=generator)


def _moments(error, y, split):
    moment, hessian = ErrorMoment(error.shape[1], y.shape[1]), Hessian(y.shape[1])
    for a, b in zip(error.split(split), y.split(split), strict=True):
        moment.update(a, b)
        hessian.update(b)
    return moment.matrix, hessian.matrix


@pytest.mark.parametrize("split", [400, 37])
def test_the_corrected_weight_is_the_least_squares_solution_for_the_original_output(split):
    x, y, weight = _inputs()
    moment, hessian = _moments(x - y, y, split)
    found = corrected_weight(weight, weight @ moment, hessian, 1e-9)
    expected = np.linalg.lstsq(y.double().numpy(), (x @ weight.t()).double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_an_error_beside_the_layer_is_taken_back_as_far_as_the_input_tells_it():
    _, y, weight = _inputs()
    rest = torch.cat([y[:, :3] * 0.5, torch.zeros(len(y), 4)], 1)
    moment, hessian = _moments(rest, y, 100)
    found = corrected_weight(weight, moment, hessian, 1e-9)
    expected = np.linalg.lstsq(y.double().numpy(), (y @ weight.t() + rest).double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, weight, atol=0.1)


def test_what_the_input_tells_of_its_own_error_serves_every_weight_that_reads_it():
    x, y, weight = _inputs()
    moment, hessian = _moments(x - y, y, 100)
    factor = damped_factor(hessian, 0.01)
    expected = corrected_weight(weight, weight @ moment, hessian, 0.01, factor)
    torch.testing.assert_close(weight + weight @ told_by_input(moment, factor), expected)
    assert not torch.allclose(expected, weight, atol=0.1)
    with pytest.raises(ValueError, match="error: NaN or inf"):
        told_by_input(moment * torch.nan, factor)


def test_no_error_leaves_the_weight_alone():
    x, _, weight = _inputs()
    moment, hessian = _moments(x - x, x, 100)
    assert torch.equal(corrected_weight(weight, weight @ moment, hessian, 0.01), weight)


def test_strong_damping_holds_the_weight_and_dead_inputs_change_nothing():
    x, y, weight = _inputs()
    moment, hessian = _moments(x - y, y, 100)
    moment = weight @ moment
    near, far = (float((corrected_weight(weight, moment, hessian, d) - weight).norm()) for d in (100.0, 0.01))
    assert near < 0.02 * far
    assert torch.equal(corrected_weight(weight, moment * 0, hessian * 0, 0.01), weight)


def test_wrong_moments_are_refused_by_name():
    x, y, weight = _inputs()
    moment, hessian = _moments(x - y, y, 100)
    with pytest.raises(ValueError, match="damping: 0"):
        corrected_weight(weight, weight @ moment, hessian, 0)
    with pytest.raises(ValueError, match=r"\(7, 12\)"):
        corrected_weight(weight, moment, hessian, 0.01)
    with pytest.raises(ValueError, match="error, present: shapes"):
        ErrorMoment(12, 12).update(x, y[:5])


def moments_of(x, error):
    """M and H of tokens (tokens, in) that carry an error (tokens, out)."""
    return 2 * error.t() @ x / len(x), 2 * x.t() @ x / len(x)


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_the_strength_chosen_by_held_out_tokens_leaves_them_the_least_error_of_all(noise):
    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn(n, 24, generator=generator) for n in (60, 400))
    true = torch.randn(5, 24, generator=generator)
    errors = [t @ true.t() + noise * torch.randn(len(t), 5, generator=generator) for t in (x, other)]
    fit, held = moments_of(x, errors[0]), moments_of(other, errors[1])
    found = held_out_strength(fit, held)
    weight = torch.zeros(5, 24)
    left = {d: float((errors[1] - other @ corrected_weight(weight, *fit, d).t()).square().sum()) for d in STRENGTHS}
    assert found == min(left, key=left.__getitem__) and left[found] < float(errors[1].square().sum())


def test_an_error_that_other_tokens_do_not_have_is_not_corrected():
    generator = torch.Generator().manual_seed(2)
    x, other = (torch.randn(n, 24, generator=generator) for n in (30, 400))
    noise = [torch.randn(len(t), 5, generator=generator) for t in (x, other)]
    assert held_out_strength(moments_of(x, noise[0]), moments_of(other, -noise[1])) is None
    assert held_out_strength(moments_of(0 * x, noise[0]), moments_of(other, noise[1])) is None
    with pytest.raises(ValueError, match="held: shapes"):
        held_out_strength(moments_of(x, noise[0]), moments_of(other[:, :5], noise[1]))
    with pytest.raises(ValueError, match="NaN or inf"):
        held_out_strength(moments_of(x / 0, noise[0]), moments_of(other, noise[1]))


def test_a_hessian_that_rounding_has_left_without_a_cholesky_factor_is_solved_with_all_the_same():
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    # Its least eigenvalue is below 0 by more than the damping.
    values = torch.cat([torch.tensor([50.0, -0.2]), torch.ones(10)]).double()
    for spectrum, cholesky in ((values, False), (values.abs(), True)):
        hessian = (basis @ spectrum.diag() @ basis.t()).float()
        factor = damped_factor(hessian, 0.001)
        assert (factor.pivots is None) == cholesky
        right = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        damped = hessian.double() + 0.001 * hessian.diagonal().mean() * torch.eye(12)
        assert torch.allclose(damped @ factor.solve(right), right, atol=1e-9)
        weight, moment = torch.randn(4, 12, generator=generator), torch.randn(4, 12, generator=generator)
        given = corrected_weight(weight, moment, hessian, 0.001, factor)
        assert torch.equal(given, corrected_weight(weight, moment, hessian, 0.001))
