"""Kronecker products against numpy's, and the nearest one against the best rank-1 product that numpy's SVD finds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.transforms.kronecker import (
    balanced_factors,
    kronecker_apply,
    kronecker_inverse,
    nearest_kronecker,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5000))
def test_balanced_factors_are_the_divisors_nearest_to_each_other(width):
    a, b = balanced_factors(width)
    assert a * b == width and a <= b
    assert not any(width % d == 0 for d in range(a + 1, int(width**0.5) + 1))


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 4))
@settings(deadline=None)
def test_a_product_is_numpys(a, b, seed):
    left, right, x = normal(a, a, seed=seed), normal(b, b, seed=seed + 1), normal(2, 3, a * b, seed=seed + 2)
    whole = np.kron(left.numpy(), right.numpy())
    np.testing.assert_allclose(kronecker_apply(x, left, right).numpy(), x.numpy() @ whole, atol=1e-10)


def test_the_inverse_undoes_the_product_and_passes_gradients():
    left, right = normal(3, 3).requires_grad_(), normal(4, 4, seed=1).requires_grad_()
    x = normal(5, 12, seed=2)
    torch.testing.assert_close(kronecker_apply(kronecker_apply(x, left, right), *kronecker_inverse(left, right)), x)
    assert torch.autograd.gradcheck(lambda a, b: kronecker_apply(x, *kronecker_inverse(a, b)), (left, right))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_the_nearest_product_is_the_best_pair_of_singular_vectors(a, b, seed):
    matrix = normal(a * b, a * b, seed=seed)
    left, right, error = nearest_kronecker(matrix, a, b)
    blocks = matrix.numpy().reshape(a, b, a, b).transpose(0, 2, 1, 3).reshape(a * a, b * b)
    singular = np.linalg.svd(blocks, compute_uv=False)
    least = np.sqrt((singular[1:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(matrix.numpy() - np.kron(left, right)), least, atol=1e-7)
    np.testing.assert_allclose(error, least / np.linalg.norm(matrix.numpy()), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(left), np.linalg.norm(right), rtol=1e-6)


def test_a_product_of_positive_definite_factors_is_found_exactly_and_positive():
    wide = [normal(n, 2 * n, seed=n) for n in (3, 5)]
    first, second = (w @ w.t() for w in wide)
    left, right, error = nearest_kronecker(torch.kron(first, second), 3, 5)
    assert error < 1e-7
    torch.testing.assert_close(torch.kron(left, right), torch.kron(first, second))
    assert all(float(torch.linalg.eigvalsh(m).min()) > 0 for m in (left, right))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="left: shape"):
        kronecker_apply(torch.ones(6), torch.ones(2, 3), torch.eye(3))
    with pytest.raises(ValueError, match="x: 6 channels, expected 2 x 2 = 4"):
        kronecker_apply(torch.ones(6), torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="right: the factor is singular"):
        kronecker_inverse(torch.eye(2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="matrix: zero"):
        nearest_kronecker(torch.zeros(4, 4), 2, 2)
    with pytest.raises(ValueError, match="matrix: shape"):
        nearest_kronecker(torch.ones(4, 4), 2, 3)
    with pytest.raises(ValueError, match="width: 0"):
        balanced_factors(0)
