"""Sums over samples have one order, whoever has made which part of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.ranks.sample_sum import LEAVES, SampleSum, by_sample, leaf_of, shares, sums_held, units

settings = st.tuples(st.integers(1, 140), st.integers(1, 9), st.integers(1, 9))


def tree(leaf):
    return SampleSum(leaf, list, lambda one, other: (one, other))


@given(settings, st.sets(st.integers(0, 139)))
def test_the_order_of_additions_does_not_depend_on_who_has_which_samples(setting, present):
    samples, batch, ranks = setting
    leaf = leaf_of(samples)
    alone, together = tree(leaf), tree(leaf)
    for sample in sorted(present & set(range(samples))):
        alone.of(sample).append(sample)
    for batches in shares(samples, batch, ranks, leaf):
        own = tree(leaf)
        for sample in range(batches.start * batch, min(batches.stop * batch, samples)):
            if sample in present:
                own.of(sample).append(sample)
        together.add(own.nodes())
    assert together.total() == alone.total()


@given(settings)
def test_every_batch_has_one_rank_and_no_rank_has_a_part_of_a_leaf(setting):
    samples, batch, ranks = setting
    leaf = leaf_of(samples)
    found = shares(samples, batch, ranks, leaf)
    assert [i for share in found for i in share] == list(range(math.ceil(samples / batch)))
    assert all(share.stop * batch % leaf == 0 for share in found[:-1] if share.stop * batch < samples)
    assert math.ceil(samples / leaf) <= LEAVES
    assert all(found) == (ranks <= units(samples, batch, leaf))


def test_a_sum_of_many_samples_holds_few_parts():
    summed = tree(1)
    for sample in range(LEAVES):
        summed.of(sample).append(sample)
        assert len(summed._done) <= math.log2(LEAVES)
    assert len(summed.nodes()) == 1


def test_samples_come_in_order():
    summed = tree(2)
    summed.of(4)
    summed.of(6)
    with pytest.raises(ValueError, match="sample 3 comes after"):
        summed.of(3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3, 4), [(4, slice(0, 3)), (5, slice(3, 6))]),
        ((2, 3, 2, 4), [(4, slice(0, 6)), (5, slice(6, 12))]),
        ((7, 4), [(4, slice(0, 7))]),
        ((5, 3, 4), [(4, slice(0, 15))]),
    ],
    ids=["samples", "heads", "tokens of an expert", "another dimension in front"],
)
def test_rows_belong_to_samples_where_a_tensor_has_a_dimension_of_samples(shape, expected):
    assert by_sample(torch.empty(shape), slice(4, 6)) == expected


@given(st.integers(1, 140))
def test_what_was_merged_is_filled_again_with_the_same_sums_and_no_more_accumulators_than_are_held(samples):
    made = []

    def empty():
        made.append(torch.zeros((), dtype=torch.float64))
        return made[-1]

    again = SampleSum(leaf_of(samples), empty, torch.Tensor.add_, torch.Tensor.zero_)
    anew = SampleSum(leaf_of(samples), empty, torch.Tensor.add)
    values = torch.randn(samples, dtype=torch.float64)
    for sample, value in enumerate(values):
        again.of(sample).add_(value)
    assert len(made) <= sums_held(samples)
    for sample, value in enumerate(values):
        anew.of(sample).add_(value)
    assert again.total() == anew.total() == pytest.approx(float(values.sum()))
