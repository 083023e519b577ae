"""Clusters of channels against scikit-learn called directly, and what must not change them."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from group_methods.kmeans import (
    ChannelRange,
    cluster,
    cluster_heads,
    features,
    max_min_features,
    max_std_features,
    share_heads,
)


def _random(rows, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator) * torch.rand(channels, generator=generator).exp()


def _range(channels, seed):
    x = _random(16, channels, seed)
    return ChannelRange(x.amin(0), x.amax(0), x.std(0, correction=0))


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 40), st.integers(1, 8))
def test_clusters_equal_scikit_learn_called_directly(seed, rows, channels, k):
    x = _random(rows, channels, seed)
    found = cluster(x, min(k, channels), seed=seed % 100, restarts=3)
    expected = KMeans(n_clusters=min(k, channels), n_init=3, random_state=seed % 100).fit(x.double().numpy().T)
    assert adjusted_rand_score(expected.labels_, found.labels) == 1
    ours = found.centroids[found.labels].numpy()
    assert np.allclose(ours, expected.cluster_centers_[expected.labels_], rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 20), st.integers(1, 30), st.integers(1, 5))
def test_every_label_has_a_channel_and_centroids_are_means_in_ascending_order(seed, rows, channels, k, levels):
    # Few levels: many channels are equal, and often fewer are distinct than clusters are asked for.
    x = torch.randint(levels, (rows, channels), generator=torch.Generator().manual_seed(seed)).float()
    found = cluster(x, k, restarts=2)
    distinct = len(torch.unique(x, dim=1).T)
    assert found.labels.unique().tolist() == list(range(len(found.centroids)))
    assert len(found.centroids) == min(k, distinct)
    means = torch.stack([x[:, found.labels == c].double().mean(1) for c in range(len(found.centroids))])
    assert torch.allclose(found.centroids, means, atol=1e-12)
    norms = found.centroids.norm(dim=1)
    assert (norms[1:] >= norms[:-1] - 1e-9).all()


def test_one_cluster_holds_all_channels_and_as_many_clusters_as_channels_hold_one_each():
    x = _random(3, 12)
    assert cluster(x, 1).labels.tolist() == [0] * 12
    assert torch.allclose(cluster(x, 1).centroids[0], x.double().mean(1))
    for k in (12, 13, 500):
        found = cluster(x, k)
        assert found.labels.sort().values.tolist() == list(range(12))
        assert torch.equal(found.centroids[found.labels], x.double().T)


def test_zero_and_minus_zero_are_one_feature():
    assert cluster(torch.tensor([[0.0, -0.0, 1.0]]), 3).labels.tolist() == [0, 0, 1]


def test_extent_numbers_the_clusters_and_forms_none():
    x = torch.tensor([[0.0, 0.1, 5.0, 5.1, 9.0]])
    extent = torch.tensor([7.0, 7.0, 1.0, 1.0, 3.0])
    assert cluster(x, 3).labels.tolist() == [0, 0, 1, 1, 2]
    assert cluster(x, 3, extent=extent).labels.tolist() == [2, 2, 0, 0, 1]
    assert cluster(x, 3, extent=torch.zeros(5)).labels.tolist() == [0, 0, 1, 1, 2]


def test_the_number_of_threads_does_not_change_a_bit():
    # Enough channels for several of scikit-learn's chunks (256 points), which its threads add in any order.
    x = _random(24, 2048)
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(limits=threads):
            found.append(cluster(x, 8, restarts=1))
    assert all(torch.equal(f.labels, found[0].labels) for f in found)
    assert all(torch.equal(f.centroids, found[0].centroids) for f in found)


def test_the_seed_decides_and_the_global_generators_do_not():
    x = _random(4, 200)
    np.random.seed(1)
    torch.manual_seed(1)
    first = cluster(x, 20, seed=3, restarts=1)
    np.random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(cluster(x, 20, seed=3, restarts=1).labels, first.labels)
    assert not torch.equal(cluster(x, 20, seed=4, restarts=1).labels, first.labels)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 60), st.floats(-100, 100), st.floats(1e-6, 1e6))
def test_standardised_rows_equal_scikit_learns_scaler(seed, channels, shift, scale):
    rows = (_random(3, channels, seed).double() + shift) * scale
    constant = torch.full((channels,), 0.1, dtype=torch.float64)
    table = features([*rows, constant], standardise=True)
    expected = StandardScaler().fit_transform(rows.T.numpy()).T
    assert np.allclose(table[:3].numpy(), expected, atol=1e-6)
    assert torch.equal(table[3], torch.zeros_like(table[3]))
    assert torch.equal(features(list(rows), standardise=False), rows)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e38, 1e-40])
def test_a_constant_row_counts_for_nothing_when_standardised(value):
    row = torch.full((2049,), value)
    assert features([row], standardise=True).abs().max() == 0


def test_the_order_of_max_std_features_is_linear_then_source_then_kind():
    inputs, weights = [_range(5, 0), _range(5, 1)], [_range(5, 2), _range(5, 3)]
    table = max_std_features(inputs, weights, standardise=False)
    rows = [
        getattr(s, kind) for pair in zip(inputs, weights, strict=True) for s in pair for kind in ("max", "min", "std")
    ]
    assert table.shape == (12, 5) and torch.equal(table, torch.stack(rows).double())
    some = max_std_features(inputs, weights, standardise=False, kinds=("std", "max"), sources=("weight",))
    assert torch.equal(some, torch.stack([weights[0].std, weights[0].max, weights[1].std, weights[1].max]).double())


def test_rptqs_features_are_max_and_min():
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert max_min_features(low, high, standardise=False).tolist() == [[3.0, 0.5], [-1.0, -2.0]]


def test_heads_are_clustered_by_themselves_and_numbered_on():
    x = _random(2, 3 * 8)
    found = cluster_heads(x, 8, 3)
    assert (found.labels.view(3, 8) // 3).tolist() == [[h] * 8 for h in range(3)]
    for head in range(3):
        alone = cluster(x[:, head * 8 : head * 8 + 8], 3)
        assert torch.equal(found.labels.view(3, 8)[head], alone.labels + 3 * head)
        assert torch.equal(found.centroids[3 * head : 3 * head + 3], alone.centroids)


def test_a_head_with_fewer_distinct_channels_leaves_no_gap_in_the_numbers():
    x = torch.cat([torch.zeros(1, 4), torch.arange(4.0)[None]], dim=1)
    found = cluster_heads(x, 4, 4, extent=x[0])
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


def test_query_heads_that_read_one_value_head_are_stacked():
    # 4 query heads of 3 channels over 2 value heads: the hundreds digit is the head, the thousands the row.
    x = torch.tensor([[1000 * r + 100 * h + c for h in range(4) for c in range(3)] for r in range(2)])
    shared = share_heads(x, 3, 2)
    assert shared.tolist() == [
        [0, 1, 2, 200, 201, 202],
        [1000, 1001, 1002, 1200, 1201, 1202],
        [100, 101, 102, 300, 301, 302],
        [1100, 1101, 1102, 1300, 1301, 1302],
    ]
    assert torch.equal(share_heads(x, 3, 1), x)


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD)
def test_figures_that_are_not_finite_are_refused_by_name(bad):
    row = torch.tensor([1.0, bad])
    fine = ChannelRange(*torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"rows\[1\]: holds NaN or inf"):
        features([torch.ones(2), row], standardise=True)
    with pytest.raises(ValueError, match=r"weights\[1\].std: holds NaN or inf"):
        max_std_features([fine, fine], [fine, ChannelRange(fine.min, fine.max, row)], standardise=False)
    with pytest.raises(ValueError, match="minimum: holds NaN or inf"):
        max_min_features(row, torch.ones(2), standardise=False)
    with pytest.raises(ValueError, match="features: row 1 holds NaN or inf"):
        cluster(torch.stack([torch.ones(2), row]), 1)
    with pytest.raises(ValueError, match="extent: holds NaN or inf"):
        cluster(torch.ones(1, 2), 1, extent=row)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cluster(x, 0), "clusters: 0 is too small"),
        (lambda x: cluster(x, 2, restarts=0), "restarts: 0 is too small"),
        (lambda x: cluster(x[0], 2), "features: shape"),
        (lambda x: cluster(x[:, :0], 2), "features: shape"),
        (lambda x: cluster(x, 2, extent=x[0, :3]), "extent: shape"),
        (lambda x: cluster_heads(x, 5, 2), "head_dim: 5 does not divide 12"),
        (lambda x: share_heads(x, 4, 2), "no whole groups of 2 heads of 4"),
        (lambda x: features([], False), "rows: there are none"),
        (lambda x: features([x[0], x[0, :5]], False), r"rows\[1\]: shape \(5,\), expected one dimension of length 12"),
        (lambda x: max_std_features([], [_range(3, 0)], False), "weights: 1 Linears, but inputs has 0"),
        (lambda x: max_std_features([], [], False, kinds=("mean",)), "expected some of max, min, std"),
        (lambda x: max_std_features([], [], False, sources=()), "expected some of input, weight"),
    ],
)
def test_what_cannot_be_clustered_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(_random(2, 12))


def test_fewer_distinct_channels_than_clusters_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cluster(torch.ones(2, 6), 4).centroids) == 1


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_channels_that_differ_by_rounding_only_leave_fewer_clusters_none_of_them_empty():
    step = 2.0**-52
    x = torch.tensor([[1, 1 + step, 1 + 2 * step, 1e6]], dtype=torch.float64)
    found = cluster(x, 3)
    assert found.labels.tolist() == [0, 0, 0, 1] and len(found.centroids) == 2
