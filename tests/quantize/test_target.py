"""The weight that makes up for a changed input, against numpy's least squares."""

import numpy as np
import pytest
import torch

from quantize.gptq import Hessian
from quantize.target import CrossMoment, corrected_weight


def _inputs(tokens=400, channels=12, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator)
    y = x + noise * torch.randn(tokens, channels, generator=generator)
    return x, y, torch.randn(7, channels, generator=generator)


def _moments(x, y, split):
    cross, hessian = CrossMoment(x.shape[1]), Hessian(x.shape[1])
    for a, b in zip(x.split(split), y.split(split), strict=True):
        cross.update(a, b)
        hessian.update(b)
    return cross.matrix, hessian.matrix


@pytest.mark.parametrize("split", [400, 37])
def test_the_corrected_weight_is_the_least_squares_solution_for_the_original_output(split):
    x, y, weight = _inputs()
    found = corrected_weight(weight, *_moments(x, y, split), 1e-9)
    expected = np.linalg.lstsq(y.double().numpy(), (x @ weight.t()).double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_an_input_that_did_not_change_leaves_the_weight_alone():
    x, _, weight = _inputs()
    torch.testing.assert_close(corrected_weight(weight, *_moments(x, x, 100), 0.01), weight, rtol=1e-5, atol=1e-5)


def test_strong_damping_holds_the_weight_and_dead_inputs_change_nothing():
    x, y, weight = _inputs()
    cross, hessian = _moments(x, y, 100)
    near, far = (float((corrected_weight(weight, cross, hessian, d) - weight).norm()) for d in (100.0, 0.01))
    assert near < 0.02 * far
    assert torch.equal(corrected_weight(weight, cross * 0, hessian * 0, 0.01), weight)


def test_wrong_moments_are_refused_by_name():
    x, y, weight = _inputs()
    cross, hessian = _moments(x, y, 100)
    with pytest.raises(ValueError, match="damping: 0"):
        corrected_weight(weight, cross, hessian, 0)
    with pytest.raises(ValueError, match="12 columns"):
        corrected_weight(weight, cross[:3], hessian, 0.01)
    with pytest.raises(ValueError, match="present: shape"):
        CrossMoment(12).update(x, y[:5])
