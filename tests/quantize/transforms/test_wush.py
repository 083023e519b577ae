"""WUSH's closed form: behind it both second moments are one, and rounding loses less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid.affine import fake_quantize_absmax
from quantize.transforms.hadamard import hadamard_transform
from quantize.transforms.wush import FACTORS, block_apply, decomposed, diagonal_blocks, wush


def problem(width=16, rows=24, tokens=200, seed=0):
    """Inputs (tokens, width) with outlying and correlated channels, and a weight (rows, width)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=generator) @ mixing
    x[:, 1] *= 30
    return x, torch.randn(rows, width, dtype=torch.float64, generator=generator)


def of_weights(found):
    """B (blocks, size, size): what keeps w . x is the inverse of A, transposed."""
    return torch.linalg.inv(found.activation).mT


@pytest.mark.parametrize("block", [None, 4, 8])
@pytest.mark.parametrize("hadamard", [True, False])
def test_in_every_block_both_second_moments_become_the_same(block, hadamard):
    x, w = problem()
    h, g = x.t() @ x / len(x), w.t() @ w
    found = wush(h, g, block, hadamard, damping=0.0)
    size = found.activation.shape[-1]
    assert size == (block or 16)
    for a, b, one, other in zip(
        found.activation, of_weights(found), diagonal_blocks(h, size), diagonal_blocks(g, size), strict=True
    ):
        moments = a.t() @ one @ a
        torch.testing.assert_close(moments, b.t() @ other @ b, rtol=1e-6, atol=1e-9 * float(moments.norm()))


@given(st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_both_second_moments_become_the_same_and_their_diagonal_constant(seed):
    x, w = problem(seed=seed)
    h, g = x.t() @ x / len(x), w.t() @ w
    found = wush(h, g, damping=0.0)
    a, b = found.activation[0], of_weights(found)[0]
    moments = a.t() @ h @ a, b.t() @ g @ b
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-6, atol=1e-6 * float(h.diagonal().max()) ** 0.5)
    diagonal = moments[0].diagonal()
    torch.testing.assert_close(diagonal, diagonal.mean().expand_as(diagonal), rtol=1e-6, atol=0)


def test_without_a_hadamard_the_moments_are_the_singular_values():
    x, w = problem()
    found = wush(x.t() @ x / len(x), w.t() @ w, hadamard=False, damping=0.0)
    moments = found.activation[0].t() @ (x.t() @ x / len(x)) @ found.activation[0]
    torch.testing.assert_close(
        moments, torch.diag(found.singular[0]), rtol=1e-6, atol=1e-6 * float(found.singular.max())
    )
    assert bool((found.singular[0].diff() <= 1e-9).all())


def test_four_bit_rounding_loses_less_than_behind_a_plain_hadamard():
    x, w = (t.float() for t in problem(width=64, rows=96, tokens=600, seed=3))
    exact = x.double() @ w.double().t()

    def error(inputs, weight):
        rounded = fake_quantize_absmax(inputs, 4).double() @ fake_quantize_absmax(weight, 4).double().t()
        return float((rounded - exact).square().mean())

    found = wush((x.t() @ x / len(x)).double(), (w.t() @ w).double())
    mine = error(block_apply(x, found.activation).float(), block_apply(w, of_weights(found)).float())
    assert mine < 0.9 * error(hadamard_transform(x), hadamard_transform(w)) < error(x, w)


def test_channels_that_nothing_used_and_singular_moments_are_damped_and_said():
    x, w = problem()
    x[:, 3] = 0
    x[:, 5] = x[:, 4]
    found = wush(x.t() @ x / len(x), w.t() @ w, damping=0.0)
    assert found.damping_activation > 0 == found.damping_weight
    torch.testing.assert_close(
        block_apply(x, found.activation) @ block_apply(w, of_weights(found)).t(), x @ w.t(), rtol=1e-4, atol=1e-4
    )


def test_diagonal_blocks_are_copies_of_the_blocks_on_the_diagonal():
    matrix = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(matrix, 2)
    assert torch.equal(blocks[1], matrix[2:4, 2:4].double()) and blocks.shape == (3, 2, 2)
    blocks.zero_()
    assert matrix[0, 1] == 1
    whole = matrix.double()
    diagonal_blocks(whole, 6).zero_()
    assert whole[0, 1] == 1


def test_what_has_no_closed_form_is_refused():
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="gram: shape"):
        wush(eye, torch.eye(3))
    with pytest.raises(ValueError, match="damping: -1"):
        wush(eye, eye, damping=-1)
    with pytest.raises(ValueError, match="block: 3 is not valid: expected a divisor of 4"):
        wush(eye, eye, block=3)
    with pytest.raises(ValueError, match="hessian: holds NaN or inf"):
        wush(eye * torch.nan, eye)
    with pytest.raises(ValueError, match="gram: not positive definite"):
        wush(eye, -1000 * eye)
    with pytest.raises(ValueError, match="x: 5 channels, expected 2 blocks of 2"):
        block_apply(torch.ones(5), torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="size: 3"):
        diagonal_blocks(eye, 3)


def test_maps_of_a_thousand_channels_whose_determinants_leave_float64_get_unit_volume():
    size = 1024
    scale = torch.logspace(0, 2, 2 * size, dtype=torch.float64)
    gram = torch.cat([1e-4 * scale[:size], 1e4 * scale[size:]])
    found = wush(torch.diag(scale), torch.diag(gram), size)
    assert torch.linalg.det(found.activation).abs().tolist() == [0, float("inf")]
    assert torch.allclose(found.log_volume, torch.linalg.slogdet(found.activation).logabsdet, atol=1e-6)
    logs = torch.linalg.slogdet(found.unit_volume()).logabsdet
    assert torch.allclose(logs, torch.zeros(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.unit_volume() / found.activation, (-found.log_volume / size).exp()[:, None, None])


@given(
    st.integers(0, 1000),
    st.sampled_from([8, 24, 48]),
    st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]),
    st.floats(0, 4),
    st.integers(4, 60),
)
@settings(max_examples=40, deadline=None)
def test_the_squared_decomposition_gives_the_transform_of_the_published_one(seed, width, damping, decades, tokens):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, width, dtype=torch.float64, generator=generator) for n in (tokens, 2 * width))
    x = x * torch.logspace(0, decades, width, dtype=torch.float64)
    h, g = x.t() @ x / tokens, w.t() @ w
    found = wush(h, g, hadamard=False, damping=damping)
    one = torch.eye(width, dtype=torch.float64)
    inputs, weights = (torch.linalg.cholesky(m + damping * m.diagonal().mean() * one) for m in (h, g))
    u, s, _ = torch.linalg.svd(weights.t() @ inputs)
    torch.testing.assert_close(found.singular[0], s, rtol=1e-6, atol=0)
    # A A^T does not see which of the equivalent vectors were taken: those of alike singular values turn freely.
    published = weights @ (u / s) @ u.t() @ weights.t()
    ours = found.activation[0] @ found.activation[0].t()
    assert float((ours - published).norm()) < 1e-6 * float(published.norm())
    assert found.damping_activation == found.damping_weight == damping


def test_moments_whose_squares_would_lose_the_least_directions_are_decomposed_as_published():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator)).Q
    h = turn @ torch.diag(torch.logspace(0, -12, 16, dtype=torch.float64)) @ turn.t()
    _, w = problem()
    found = wush(h, w.t() @ w, hadamard=False, damping=0.0)
    a = found.activation[0]
    b = torch.linalg.inv(a).t()
    moments = [
        m / found.singular[0].sqrt() / found.singular[0].sqrt()[:, None] for m in (a.t() @ h @ a, b.t() @ w.t() @ w @ b)
    ]
    for of in moments:
        torch.testing.assert_close(of, torch.eye(16, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("block", [None, 8])
def test_one_decomposition_gives_the_published_map_where_little_is_added_and_unit_volume_at_every_damping(block):
    x, w = problem()
    h, g = x.t() @ x / len(x), w.t() @ w
    found, published = decomposed(h, g, block), wush(h, g, block, hadamard=False, damping=FACTORS)
    unit = published.unit_volume()
    for damping in (1e-7, 1e-2, 1.0):
        made = found.unit_volume(damping, hadamard=False)
        assert made.dtype == torch.float32
        logs = torch.linalg.slogdet(made.double()).logabsdet
        torch.testing.assert_close(logs, torch.zeros_like(logs), atol=1e-4, rtol=0)
        # A A^T does not see the vectors' signs.
        share = published.singular.square()
        share = share / share.mean(1, keepdim=True)
        added = unit * (share / (share + damping)).pow(0.25)[:, None, :]
        added = added / torch.linalg.det(added).abs().pow(1 / unit.shape[-1])[:, None, None]
        expected, ours = added @ added.mT, made.double() @ made.double().mT
        assert float((ours - expected).norm()) < 1e-4 * float(expected.norm())


def test_a_decomposition_of_channels_that_nothing_used_is_finite_and_what_it_cannot_be_made_of_is_refused():
    x, w = problem()
    x[:, 3] = 0
    found = decomposed(x.t() @ x / len(x), w.t() @ w)
    assert bool(torch.isfinite(found.unit_volume(1e-4)).all()) and bool((found.squares >= 0).all())
    with pytest.raises(ValueError, match="damping: 0"):
        found.unit_volume(0.0)
    with pytest.raises(ValueError, match="gram: shape"):
        decomposed(torch.eye(4), torch.eye(3))
    with pytest.raises(ValueError, match="hessian: holds NaN or inf"):
        decomposed(torch.eye(4) * torch.nan, torch.eye(4))


@pytest.mark.parametrize(("block", "hadamard"), [(None, True), (8, True), (8, False)])
def test_what_is_behind_the_map_of_a_damping_is_what_the_map_and_its_inverse_give(block, hadamard):
    x, w = (t.float() for t in problem())
    found = decomposed((x.t() @ x / len(x)).double(), (w.t() @ w).double(), block)
    behind = found.behind(x, w, hadamard)
    for damping in (1e-3, 1.0):
        inputs, weight = behind(damping)
        made = found.unit_volume(damping, hadamard)
        torch.testing.assert_close(inputs, block_apply(x, made), rtol=1e-4, atol=1e-4 * float(inputs.abs().max()))
        inverse = torch.linalg.inv(made.double()).mT
        torch.testing.assert_close(weight, block_apply(w, inverse), rtol=1e-3, atol=1e-4 * float(weight.abs().max()))
        torch.testing.assert_close(
            inputs @ weight.t(), x @ w.t(), rtol=1e-3, atol=1e-3 * float((x @ w.t()).abs().max())
        )
