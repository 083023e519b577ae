"""The weight that makes up for an error, against numpy's least squares."""

import numpy as np
import pytest
import torch

from quantize.solvers.correction import ErrorMoment, corrected_weight
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
