"""Reordering leaves functions alone: products of weights, attention scores under rotary embeddings, ranges of clusters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from group_methods.kmeans import cluster_heads
from group_methods.reorder import (
    cluster_sizes,
    expand,
    inverse,
    order_of,
    permute_columns,
    permute_rows,
    ranges_of,
    repeat_heads,
)
from quantize.grid.affine import fake_quantize, grid_from_range

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(
    lambda numbers: torch.unique(torch.tensor(numbers), return_inverse=True)[1]
)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(LABELS)
def test_an_order_makes_clusters_contiguous_and_keeps_channels_of_a_cluster_in_order(labels):
    order = order_of(labels)
    expected = sorted(range(len(labels)), key=lambda i: (int(labels[i]), i))
    assert order.tolist() == expected
    assert torch.equal(
        labels[order], torch.repeat_interleave(torch.arange(len(cluster_sizes(labels))), cluster_sizes(labels))
    )


@given(LABELS)
def test_the_inverse_undoes_the_order_from_both_sides(labels):
    order = order_of(labels)
    x = torch.arange(len(labels))
    assert torch.equal(x[order][inverse(order)], x) and torch.equal(x[inverse(order)][order], x)


@given(LABELS, st.integers(0, 2**31))
def test_rows_of_the_producer_and_columns_of_the_reader_move_alike_and_leave_the_function(labels, seed):
    size = len(labels)
    up, bias, down, x = _random(size, 3, seed=seed), _random(size), _random(4, size), _random(5, 3)
    order = order_of(labels)
    before = torch.relu(x @ up.T + bias) @ down.T
    hidden = torch.relu(x @ permute_rows(up, order).T + permute_rows(bias, order))
    assert torch.allclose(hidden @ permute_columns(down, order).T, before, atol=1e-10)


@given(LABELS, st.integers(0, 2**31))
def test_ranges_of_clusters_equal_those_of_a_loop_and_expand_to_channels(labels, seed):
    low, high = _random(2, len(labels), seed=seed).sort(dim=0).values
    least, greatest = ranges_of(labels, low, high)
    assert least.tolist() == [float(low[labels == c].min()) for c in range(len(least))]
    assert greatest.tolist() == [float(high[labels == c].max()) for c in range(len(greatest))]
    assert expand(labels, least).tolist() == [float(least[c]) for c in labels]
    assert (expand(labels, least) <= low).all() and (expand(labels, greatest) >= high).all()
    stacked = torch.stack([least, greatest])
    assert torch.equal(expand(labels, stacked)[1], expand(labels, greatest))


@given(LABELS, st.integers(0, 2**31))
def test_quantization_in_place_and_quantization_of_reordered_channels_give_the_same_numbers(labels, seed):
    x = _random(6, len(labels), seed=seed).float()
    ranges = ranges_of(labels, x.amin(0), x.amax(0))
    in_place = fake_quantize(x, grid_from_range(*(expand(labels, end) for end in ranges), 4, False))
    order = order_of(labels)
    pieces = x[:, order].split(cluster_sizes(labels).tolist(), dim=1)
    done = [
        fake_quantize(piece, grid_from_range(low, high, 4, False))
        for piece, low, high in zip(pieces, *ranges, strict=True)
    ]
    assert torch.equal(torch.cat(done, dim=1)[:, inverse(order)], in_place)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4))
def test_orders_of_heads_stay_inside_their_head(seed, heads, head_dim, k):
    labels = cluster_heads(_random(2, heads * head_dim, seed=seed), head_dim, k, restarts=1).labels
    order = order_of(labels)
    assert torch.equal(order // head_dim, torch.arange(heads * head_dim) // head_dim)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_query_heads_move_as_the_head_that_they_read(seed, heads, repeat, head_dim):
    labels = cluster_heads(_random(2, heads * head_dim, seed=seed), head_dim, 3, restarts=1).labels
    repeated = repeat_heads(labels, head_dim, repeat)
    order = order_of(repeated).view(heads, repeat, head_dim) % head_dim
    assert torch.equal(order, (order_of(labels).view(heads, 1, head_dim) % head_dim).expand_as(order))
    ours, theirs = repeated.view(heads, repeat, head_dim), labels.view(heads, 1, head_dim)
    assert torch.equal(ours - ours.amin(-1, True), (theirs - theirs.amin(-1, True)).expand_as(ours))
    assert len(cluster_sizes(repeated)) == repeat * len(cluster_sizes(labels))


@given(st.integers(0, 1000))
def test_any_order_inside_heads_after_the_rotation_leaves_attention_scores(seed):
    kv_heads, repeat, head_dim, tokens = 2, 2, 8, 5
    query = _random(1, repeat * kv_heads, tokens, head_dim, seed=seed)
    key = _random(1, kv_heads, tokens, head_dim, seed=seed + 1)
    angles = torch.arange(tokens)[:, None] / 50 ** (torch.arange(0, head_dim, 2).double() / head_dim)
    table = torch.cat([angles, angles], dim=-1)[None]
    query, key = (apply_rotary_pos_emb(x, x, table.cos(), table.sin())[0] for x in (query, key))
    labels = cluster_heads(_random(2, kv_heads * head_dim, seed=seed + 2), head_dim, 3, restarts=1).labels

    def moved(x, order):
        return x.transpose(1, 2).flatten(2)[..., order].view(1, tokens, -1, head_dim).transpose(1, 2)

    def scores(query, key):
        return query @ key.repeat_interleave(repeat, dim=1).transpose(-1, -2)

    together = moved(query, order_of(repeat_heads(labels, head_dim, repeat))), moved(key, order_of(labels))
    assert torch.allclose(scores(*together), scores(query, key), atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: order_of(torch.tensor([0, 2])), "labels: 0 .. 2, expected 0 .. 1 at most"),
        (lambda: order_of(torch.tensor([0, 2, 2])), "labels: no channel has label 1"),
        (lambda: order_of(torch.tensor([-1, 0])), "labels: -1 .. 0"),
        (lambda: order_of(torch.tensor([0.0, 1.0])), "expected whole numbers"),
        (lambda: cluster_sizes(torch.tensor([], dtype=torch.int64)), "expected whole numbers"),
        (lambda: inverse(torch.tensor([0, 0])), "is no permutation of 0 .. 1"),
        (lambda: permute_rows(torch.ones(3), torch.tensor([1, 0])), "is no permutation of 0 .. 2"),
        (lambda: permute_columns(torch.ones(2, 3), torch.tensor([0, 1, 3])), "is no permutation of 0 .. 2"),
        (lambda: repeat_heads(torch.tensor([0, 1, 0]), 2, 2), "head_dim: 3 labels are no whole heads of 2"),
        (lambda: ranges_of(torch.tensor([0, 0]), torch.zeros(3), torch.zeros(2)), "minimum: shape"),
        (lambda: ranges_of(torch.tensor([0]), torch.zeros(1), torch.tensor([torch.nan])), "maximum: holds NaN or inf"),
        (lambda: expand(torch.tensor([0, 1]), torch.zeros(3)), "per_cluster: 3 values for 2 clusters"),
    ],
)
def test_what_is_no_order_label_or_range_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
