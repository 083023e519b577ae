"""Orthogonal matrices: uniform random ones, and learning steps that stay orthogonal and go downhill."""

import itertools

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.transforms.orthogonal import cayley_step, qr_step, random_orthogonal
from tests.quantize.transforms.matrices import orthogonality_error

STEPS = [cayley_step, qr_step]


@given(st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_random_matrix_is_orthogonal_and_the_seeds_own(width, seed):
    matrix = random_orthogonal(width, seed)
    assert float(orthogonality_error(matrix)) < 1e-12
    assert torch.equal(matrix, random_orthogonal(width, seed))
    assert width == 1 or not torch.equal(matrix, random_orthogonal(width, seed + 1))


def test_random_matrices_favour_no_sign_of_their_first_entry():
    first = torch.tensor([float(random_orthogonal(3, seed)[0, 0]) for seed in range(400)])
    assert abs(float(first.mean())) < 0.1
    assert abs(float(first.square().mean()) - 1 / 3) < 0.05


@pytest.mark.parametrize("step", STEPS)
@given(width=st.integers(2, 16), seed=st.integers(0, 5), rate=st.floats(0, 10))
@settings(max_examples=30, deadline=None)
def test_a_step_of_any_length_stays_orthogonal(step, width, seed, rate):
    gradient = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    stepped = step(random_orthogonal(width, seed), gradient, rate)
    assert float(orthogonality_error(stepped)) < 1e-9


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_no_length_changes_nothing(step):
    q = random_orthogonal(8, 0)
    torch.testing.assert_close(step(q, torch.randn(8, 8, dtype=torch.float64), 0.0), q)


def test_the_cayley_step_is_the_cayley_transform_of_the_skew_gradient():
    generator = torch.Generator().manual_seed(1)
    q, g = random_orthogonal(6, 1), torch.randn(6, 6, dtype=torch.float64, generator=generator)
    skew = (g @ q.t() - q @ g.t()).numpy()
    eye = torch.eye(6, dtype=torch.float64).numpy()
    expected = scipy.linalg.solve(eye + 0.15 * skew, (eye - 0.15 * skew) @ q.numpy())
    torch.testing.assert_close(cayley_step(q, g, 0.3), torch.from_numpy(expected))


@pytest.mark.parametrize("step", STEPS)
def test_steps_find_the_rotation_that_is_nearest_to_another(step):
    wanted = random_orthogonal(10, 3)
    q = torch.linalg.matrix_exp(0.3 * (wanted - wanted.t())) @ wanted
    losses = []
    for _ in range(200):
        losses.append(float((q - wanted).square().sum()))
        q = step(q, 2 * (q - wanted), 0.2)
    assert losses[-1] < 1e-6 < losses[0]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("step", STEPS)
def test_rounding_does_not_add_up_over_many_steps_in_float32(step):
    generator = torch.Generator().manual_seed(0)
    q = random_orthogonal(32, 0, torch.float32)
    for _ in range(300):
        q = step(q, torch.randn(32, 32, generator=generator), 0.1)
    assert q.dtype == torch.float32 and float(orthogonality_error(q)) < 5e-6


@pytest.mark.parametrize("step", STEPS)
def test_shapes_that_do_not_fit_are_refused(step):
    with pytest.raises(ValueError, match="matrix: shape"):
        step(torch.ones(3, 4), torch.ones(3, 4), 0.1)
    with pytest.raises(ValueError, match="gradient: shape"):
        step(torch.eye(3), torch.ones(2, 2), 0.1)
    with pytest.raises(ValueError, match="width: 0"):
        random_orthogonal(0, 0)
