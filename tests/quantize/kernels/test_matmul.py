"""Products of matrices on CPUs."""

import copy
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantize.kernels import matmul as products
from quantize.kernels.matmul import (
    SMALL,
    Linear,
    add_gram,
    fast_linears,
    filled,
    linear,
    product,
    row_squares,
    use_fast_linears,
)
from tests.quantize.reference import normal


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """oneDNN multiplies here on every CPU, also where MKL is as fast."""
    monkeypatch.setattr(products, "_is_ahead", lambda: True)


SIZES = st.sampled_from([1, 3, 64, 130, 300])


def close(result, expected):
    """Whether float32 arithmetic can have given `result` for the float64 matrix `expected`."""
    return np.allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(expected).max()))


def views(rows, columns, seed):
    """Matrices (rows, columns) of every layout that the callers have."""
    return {
        "whole": normal(rows, columns, seed=seed),
        "part of a row": normal(rows, columns + 5, seed=seed)[:, 2 : columns + 2],
        "transposed": normal(columns, rows, seed=seed).t(),
        "part of a column": normal(columns, rows + 5, seed=seed)[:, :rows].t(),
        "every other": normal(rows, 2 * columns, seed=seed)[:, ::2],
    }


@pytest.mark.parametrize("a", views(1, 1, 0))
@pytest.mark.parametrize("b", views(1, 1, 0))
def test_a_large_product_is_numpys_whatever_the_layout(a, b):
    x, w = views(200, 96, 1)[a], views(160, 96, 2)[b]
    assert x.numel() * len(w) >= SMALL
    assert close(product(x, w.t()), x.double().numpy() @ w.double().numpy().T)


@given(
    count=st.integers(9, 300),
    inner=st.sampled_from([64, 384]),
    columns=st.sampled_from([130, 1024]),
    bias=st.booleans(),
)
def test_filling_rows_up_changes_nothing_beyond_rounding(count, inner, columns, bias):
    x, w, b = normal(count, inner), normal(columns, inner, seed=1), normal(columns, seed=2) if bias else None
    expected = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    with fast_linears():
        got = linear(x, w, b)
    if x.numel() * columns < SMALL:
        assert torch.equal(got, nn.functional.linear(x, w, b))
        return
    # Which loop oneDNN takes may depend on the number of rows (on an Intel Xeon with torch 2.11 it did, on AMD's Zen 3 and 4 not).
    bound = inner * torch.finfo(x.dtype).eps * (nn.functional.linear(x.abs(), w.abs()) + (0 if b is None else b.abs()))
    assert bool(((got - expected).abs() <= bound).all())
    with fast_linears():
        assert torch.equal(linear(x, w, b), got)


def test_few_numbers_of_rows_are_multiplied_up_to_a_thousand():
    counts = range(1, 1025)
    assert len({filled(count) for count in counts}) <= 64
    assert all(count <= filled(count) <= count * 9 / 8 + 7 for count in counts)
    assert filled(2049) == 2049


@given(rows=SIZES, inner=SIZES, columns=SIZES, bias=st.booleans(), leading=st.sampled_from([(), (2,), (2, 3)]))
def test_linear_is_that_of_torch_in_float64(rows, inner, columns, bias, leading):
    x, w, b = normal(*leading, rows, inner), normal(columns, inner, seed=1), normal(columns, seed=2) if bias else None
    expected = nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    with fast_linears():
        assert close(linear(x, w, b), expected.numpy())
    assert torch.equal(linear(x, w, b), nn.functional.linear(x, w, b))


@given(tokens=st.sampled_from([1, 511, 512, 1025]), channels=st.sampled_from([1, 5, 256, 300, 520]), half=st.booleans())
def test_a_gram_matrix_has_numpys_upper_triangle(tokens, channels, half):
    x = normal(tokens, channels).to(torch.float16 if half else torch.float32)
    total = torch.eye(channels)
    add_gram(total, x)
    wide = x.double().numpy()
    assert close(total.triu(), np.triu(wide.T @ wide + np.eye(channels)))


@given(rows=SIZES, channels=st.sampled_from([1, 5, 256, 300, 520]))
def test_row_squares_are_those_of_the_whole_product(rows, channels):
    x, m = normal(rows, channels), normal(channels, channels, seed=1)
    m = m @ m.t() / channels
    assert close(row_squares(x, m), np.einsum("ri,ij,rj->r", *(t.double().numpy() for t in (x, m, x))))


@fast_linears()
def test_other_types_and_gradients_are_left_to_torch():
    x, w = normal(64, 512), normal(64, 512, seed=1).requires_grad_()
    linear(x, w).sum().backward()
    assert torch.allclose(w.grad, x.sum(0).expand_as(w), rtol=1e-5, atol=1e-4)
    wide = w.detach().double()
    assert torch.equal(linear(x.double(), wide), nn.functional.linear(x.double(), wide))


def test_the_same_product_has_the_same_bits_every_time():
    x, w = normal(256, 512), normal(256, 512, seed=1)
    first = product(x, w.t())
    assert all(torch.equal(product(x.clone(), w.clone().t()), first) for _ in range(5))


def test_without_onednn_torch_multiplies(monkeypatch):
    x, w = normal(256, 512), normal(256, 512, seed=1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(product(x, w.t()), nn.functional.linear(x, w))


def test_the_context_ends_with_an_error_and_may_be_nested():
    x, w = normal(256, 512), normal(256, 512, seed=1)
    plain, fast = linear(x, w), product(x, w.t())
    with pytest.raises(KeyError), fast_linears():
        assert torch.equal(linear(x, w), fast)
        with fast_linears(False):
            assert torch.equal(linear(x, w), plain)
        assert torch.equal(linear(x, w), fast)
        raise KeyError
    assert torch.equal(linear(x, w), plain)


def test_a_models_linears_keep_their_parameters_hooks_and_names_and_follow_a_copy():
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module))
    plain, x = copy.deepcopy(model), normal(64, 512)
    use_fast_linears(model)
    assert all(
        type(m) is Linear and isinstance(m, nn.Linear) and type(m).__name__ == "Linear" for m in (model[0], model[2])
    )
    assert repr(model) == repr(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[2].weight.zero_()
        assert torch.equal(model(x), plain(x))
        with fast_linears():
            assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(copied(x), copied[2].bias.expand(64, 8))
    assert model[0] in seen


class _Own(nn.Linear):
    pass


def test_subclasses_of_linear_stay_what_they_are():
    model = nn.Sequential(_Own(4, 4))
    use_fast_linears(model)
    assert type(model[0]) is _Own


def test_a_product_of_a_part_of_a_matrix_takes_no_reference_loops():
    # Their 1,000 times as many seconds would not go unnoticed; 20 times leaves room for a busy machine.
    big = normal(1024, 1088, seed=1)
    seconds = {}
    for name, w in (("whole", big[:, :1024].contiguous()), ("part", big[:, :1024])):
        x = normal(1024, 1024)
        product(x, w.t())
        seconds[name] = min(_seconds(lambda x=x, w=w: product(x, w.t())) for _ in range(3))
    assert seconds["part"] < 20 * seconds["whole"]


def _seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def test_the_operation_of_onednn_is_there():
    assert products.by_onednn(normal(256, 512), normal(256, 512)) is torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_where_a_cpu_has_no_products_of_16_bits_they_are_float32s_rounded_once(monkeypatch, kind, bias):
    monkeypatch.setattr(products, "_is_supported", lambda dtype: False)
    x, w, b = (normal(*shape, seed=i).to(kind) for i, shape in enumerate([(2, 40, 96), (300, 96), (300,)]))
    b = b if bias else None
    with fast_linears():
        got = linear(x, w, b)
        monkeypatch.setattr(products, "WIDENED", 96 * 70)
        by_strips = linear(x, w, b)
    exact = x.double() @ w.double().t() + (0 if b is None else b.double())
    assert got.dtype == kind and torch.equal(got, by_strips)
    # Half a unit in the last place, of numbers up to twice the smallest of their power of two, and float32's own rounding.
    assert ((got.double() - exact).abs() <= torch.finfo(kind).eps / 2 * exact.abs() + 1e-4).all()
    assert torch.equal(linear(x, w, b), nn.functional.linear(x, w, b))  # outside, torch's own bits


def test_a_product_of_16_bits_has_a_derivative_where_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(products, "_is_supported", lambda dtype: False)
    x, w = normal(64, 128).bfloat16().requires_grad_(), normal(256, 128, seed=1).bfloat16()
    with fast_linears():
        linear(x, w).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(nn.functional.linear(x, w).sum(), x)[0])


def test_where_onednn_is_not_ahead_torch_multiplies(monkeypatch):
    x, w = normal(300, 512), normal(300, 512, seed=1)
    assert products.by_onednn(x, w)
    monkeypatch.setattr(products, "_is_ahead", lambda: False)
    assert not products.by_onednn(x, w)
    with fast_linears():
        assert torch.equal(linear(x, w), nn.functional.linear(x, w))


def test_a_torch_without_onednn_is_left_its_own_products_of_16_bits(monkeypatch):
    products._is_supported.cache_clear()
    monkeypatch.setitem(products.SUPPORTED, torch.bfloat16, "_is_no_operation")
    x, w = normal(64, 512).bfloat16(), normal(256, 512, seed=1).bfloat16()
    try:
        assert not products.by_float32(x, w)
    finally:
        products._is_supported.cache_clear()
