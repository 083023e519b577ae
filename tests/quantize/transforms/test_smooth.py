"""SmoothQuant's arithmetic against the published formula worked out by hand, and against what it must preserve."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.transforms.smooth import divide_norm, divide_rows, multiply_columns, shared_scale, smoothing_scale


def test_the_scale_is_the_published_formula_worked_out_by_hand():
    # max|X| = (16, 4, 1); two readers with max|W| = (1, 4, 0.25) and (2, 1, 0.25): together (2, 4, 0.25).
    activation, readers = torch.tensor([16.0, 4.0, 1.0]), torch.tensor([[1.0, 4.0, 0.25], [2.0, 1.0, 0.25]])
    scale = smoothing_scale(activation, readers.amax(0), 0.5)
    torch.testing.assert_close(scale, torch.tensor([4 / 2**0.5, 1.0, 2.0]))
    # alpha 0.75: 16^.75 = 8, 2^.25 = 1.18921; 4^.75 = 2.82843, 4^.25 = 1.41421; 1 / .25^.25 = 1.41421.
    torch.testing.assert_close(
        smoothing_scale(activation, readers.amax(0), 0.75), torch.tensor([6.7271713, 2.0, 1.4142135])
    )


def test_beta_is_the_exponent_of_the_weights_and_one_minus_alpha_without_it():
    activation, weight = torch.tensor([16.0, 4.0]), torch.tensor([4.0, 0.25])
    torch.testing.assert_close(smoothing_scale(activation, weight, 0.0, 0.5), torch.tensor([0.5, 2.0]))
    assert torch.equal(smoothing_scale(activation, weight, 0.25), smoothing_scale(activation, weight, 0.25, 0.75))
    with pytest.raises(ValueError, match="beta: 2"):
        smoothing_scale(activation, weight, 0.5, 2)


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-5, 1.0, 65504.0, 1e30]), min_size=1, max_size=8),
    st.sampled_from([0.0, 1e-30, 1e-5, 1.0, 65504.0, 1e30]),
    st.floats(0, 1),
)
def test_scales_are_finite_and_positive_whatever_the_range(activation, weight, alpha):
    x = torch.tensor(activation)
    scale = smoothing_scale(x, torch.full_like(x, weight), alpha)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    if weight == 0:
        assert torch.equal(scale, torch.ones_like(scale))


def test_a_magnitude_below_the_floor_counts_as_the_floor_and_one_above_as_itself():
    # The floor is 1e-5: 1e-5^.5 = 3.16228e-3, 4e-5^.5 = 6.32456e-3; on the side of the weights the roots divide.
    tiny = torch.tensor([1e-30, 1e-8, 1e-5, 4e-5, 1e-3])
    roots = torch.tensor([3.1622777e-3, 3.1622777e-3, 3.1622777e-3, 6.3245553e-3, 3.1622777e-2])
    torch.testing.assert_close(smoothing_scale(tiny, torch.ones(5), 0.5), roots)
    torch.testing.assert_close(smoothing_scale(torch.ones(5), tiny, 0.5), 1 / roots)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_rows_and_columns_rescaled_leave_the_product_alone(offset):
    generator = torch.Generator().manual_seed(0)
    x, gain, bias, w, b, w2 = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 6), (6,), (6,), (4, 6), (4,), (3, 4))
    )

    def output():
        return (((x * (gain + offset) + bias) @ w.t()) + b) @ w2.t()

    before = output()
    first, second = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (6, 4))
    divide_norm(gain, bias, first, offset)
    multiply_columns(w, first)
    divide_rows(w, b, second)
    multiply_columns(w2, second)
    torch.testing.assert_close(output(), before)


def test_query_heads_that_share_a_value_head_share_the_greatest_maximum():
    # Two value heads of two channels, each read by two query heads.
    maxima = torch.tensor([1.0, 2, 3, 1, 5, 6, 4, 9])
    assert shared_scale(maxima, 2, 2).tolist() == [3, 2, 5, 9]
    assert shared_scale(maxima, 1, 2) is maxima


def test_what_the_formula_cannot_use_is_refused_by_name():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="alpha: 1.5"):
        smoothing_scale(one, one, 1.5)
    with pytest.raises(ValueError, match="weight: shape"):
        smoothing_scale(one, torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="activation: holds NaN"):
        smoothing_scale(one / 0, one, 0.5)
