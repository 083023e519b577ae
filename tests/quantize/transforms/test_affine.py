"""FlatQuant's affine map: what is read stays what it was, whatever the factors, and they can be learned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.transforms.affine import (
    STARTS,
    AffineTransform,
    affine_from_moments,
    affine_from_scale,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(STARTS), st.sampled_from([4, 6, 12, 36]), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_input_times_weight_is_kept_from_every_start(start, width, seed):
    scale = normal(width, seed=seed).abs() + 0.1
    transform = affine_from_scale(scale, start, seed)
    x, w = normal(7, width, seed=seed + 1), normal(5, width, seed=seed + 2)
    torch.testing.assert_close(transform(x) @ transform.inverse_weight(w).t(), x @ w.t())
    torch.testing.assert_close(transform.inverse(transform(x)), x)


def test_the_map_is_the_division_by_the_diagonal_and_the_kronecker_product():
    transform = AffineTransform(normal(2, 2), normal(3, 3, seed=1), normal(6, seed=2).abs() + 1)
    x = normal(4, 6, seed=3)
    whole = torch.diag(1 / transform.diagonal) @ torch.kron(transform.left, transform.right)
    torch.testing.assert_close(transform(x), x @ whole)


def test_a_start_from_the_identity_is_smoothing_alone():
    scale = normal(12).abs() + 0.5
    x = normal(3, 12, seed=1)
    torch.testing.assert_close(affine_from_scale(scale)(x), x / scale)


def test_gradients_reach_factors_and_diagonal_from_both_sides():
    transform = affine_from_scale(torch.ones(6, dtype=torch.float64), "orthogonal", 1)
    (transform(normal(3, 6)).square().sum() + transform.inverse_weight(normal(2, 6)).pow(3).sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in transform.parameters())


def test_the_closed_form_equals_both_second_moments_where_they_are_kronecker_products():
    left, right = (m @ m.t() + torch.eye(len(m)) for m in (normal(3, 6), normal(4, 8, seed=1)))
    gram_left, gram_right = (m @ m.t() + torch.eye(len(m)) for m in (normal(3, 6, seed=2), normal(4, 8, seed=3)))
    hessian, gram = torch.kron(left, right), torch.kron(gram_left, gram_right)
    transform, error = affine_from_moments(hessian, gram, torch.ones(12, dtype=torch.float64), damping=0.0)
    assert error < 1e-6
    whole = torch.kron(transform.left, transform.right)
    inverse = torch.linalg.inv(whole).t()
    moments = whole.t() @ hessian @ whole, inverse.t() @ gram @ inverse
    ratio = (moments[0] / moments[1]).diagonal()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5, atol=0)


def test_maps_that_cannot_be_undone_are_refused():
    with pytest.raises(ValueError, match="diagonal: shape"):
        AffineTransform(torch.eye(2), torch.eye(2), torch.ones(5))
    with pytest.raises(ValueError, match="diagonal: holds NaN, inf or a zero"):
        AffineTransform(torch.eye(2), torch.eye(2), torch.zeros(4))
    with pytest.raises(ValueError, match="left: holds NaN"):
        AffineTransform(torch.eye(2) * torch.nan, torch.eye(2), torch.ones(4))
    with pytest.raises(
        ValueError, match="start: 'random' is not valid: expected one of identity, orthogonal, hadamard"
    ):
        affine_from_scale(torch.ones(4), "random")
    with pytest.raises(ValueError, match="singular"):
        AffineTransform(torch.ones(2, 2), torch.eye(2), torch.ones(4)).inverse_weight(torch.ones(3, 4))
