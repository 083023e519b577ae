"""Hadamard transforms of any width against scipy's matrices, numpy's Kronecker products, and what orthogonality asks."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.transforms.hadamard import (
    factorise,
    hadamard_matrix,
    hadamard_transform,
    random_signs,
    stages,
)
from quantize.transforms.hadamard_orders import hadamard_of_order, is_constructible


@pytest.mark.parametrize("order", [n for n in range(1, 300) if is_constructible(n) and n % 8 == 4] + [1, 2, 8, 64, 104])
def test_a_constructed_matrix_has_entries_of_one_and_orthogonal_rows(order):
    matrix = hadamard_of_order(order).numpy().astype(np.int64)
    assert matrix.shape == (order, order) and set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 52, 60, 76, 92, 108, 116, 140, 172])
def test_the_orders_that_models_need_are_constructible(order):
    assert is_constructible(order)
    assert factorise(order).kind == "hadamard"


@pytest.mark.parametrize("order", [0, 3, 6, 10, 4 * 47])
def test_an_order_that_no_construction_gives_is_refused_with_those_that_are(order):
    assert not is_constructible(order)
    with pytest.raises(ValueError, match=f"order: {order} is not valid: expected a power of two"):
        hadamard_of_order(order)


@pytest.mark.parametrize("power", range(11))
def test_powers_of_two_are_scipys_matrices(power):
    width = 2**power
    expected = scipy.linalg.hadamard(width) / math.sqrt(width)
    np.testing.assert_allclose(hadamard_matrix(width).numpy(), expected, atol=1e-12)


@given(st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_every_width_has_an_orthogonal_matrix_within_its_bound_and_says_what_it_is_made_of(width):
    found = factorise(width)
    matrix = hadamard_matrix(width).numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-9)
    assert np.abs(matrix).max() <= found.bound + 1e-12
    assert found.width == 2**found.power * found.order == math.prod(stages(found))
    if found.kind == "hadamard":
        np.testing.assert_allclose(np.abs(matrix), 1 / math.sqrt(width), atol=1e-12)
    said = found.describe()
    assert f"width {width} = " in said and ("Hartley" in said) == (found.kind == "hartley")


def test_widths_that_models_have_are_hadamards_and_one_without_says_so():
    for width in (576, 768, 1536, 2048, 4096, 5120, 8192, 11008, 14336, 28672):
        assert factorise(width).kind == "hadamard"
    assert factorise(2 * 47).kind == "hartley"
    with pytest.raises(ValueError, match="width: 0 is not valid"):
        factorise(0)


@given(st.integers(1, 200), st.integers(0, 5), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_the_fast_transform_is_the_product_with_the_matrix_and_its_inverse_undoes_it(width, seed, signed, dtype):
    signs = random_signs(width, seed) if signed else None
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = hadamard_transform(x, signs)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = x.double().numpy() @ hadamard_matrix(width, signs).numpy()
    np.testing.assert_allclose(y.double().numpy(), expected, atol=tolerance)
    torch.testing.assert_close(hadamard_transform(y, signs, inverse=True), x, atol=tolerance, rtol=0)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_input_is_transformed_in_float32_and_rounded_once(dtype):
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(hadamard_transform(x), hadamard_transform(x.float()).to(dtype))


@pytest.mark.parametrize(("width", "block"), [(48, 12), (64, 16), (96, 32), (10, 5), (7, 1)])
def test_blocks_are_transformed_each_on_its_own(width, block):
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs = random_signs(width, 3)
    pieces = (x * signs).numpy().reshape(4, -1, block) @ hadamard_matrix(block).numpy()
    np.testing.assert_allclose(hadamard_transform(x, signs, block).numpy(), pieces.reshape(4, width), atol=1e-12)
    np.testing.assert_allclose(
        hadamard_matrix(width, signs, block).numpy(),
        np.diag(signs.numpy()) @ hadamard_matrix(width, None, block).numpy(),
    )


def test_an_outlier_is_spread_evenly_over_all_channels():
    x = torch.zeros(1, 576)
    x[0, 17] = 100.0
    torch.testing.assert_close(hadamard_transform(x).abs(), torch.full((1, 576), 100 / 24))


def test_a_seed_gives_the_same_signs_and_another_seed_others():
    signs = random_signs(512, 7)
    assert torch.equal(signs, random_signs(512, 7)) and not torch.equal(signs, random_signs(512, 8))
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.2


def test_gradients_pass_as_through_the_matrix():
    x = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: hadamard_transform(t, random_signs(24, 0)), (x,))
    with torch.inference_mode():
        hadamard_transform(torch.randn(2, 44))
    y = torch.randn(2, 44, requires_grad=True)  # matrices that were made under inference mode serve here too
    hadamard_transform(y).sum().backward()
    assert y.grad is not None


def test_what_cannot_be_transformed_is_refused_with_what_can():
    with pytest.raises(ValueError, match="x: torch.int64"):
        hadamard_transform(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="block: 7 is not valid: expected a divisor of the width 48, such as"):
        hadamard_transform(torch.ones(2, 48), block=7)
    for refused in (lambda s: hadamard_transform(torch.ones(2, 8), s), lambda s: hadamard_matrix(8, s)):
        with pytest.raises(ValueError, match=r"signs: shape \(4,\) is not valid: expected \(8,\)"):
            refused(torch.ones(4))
