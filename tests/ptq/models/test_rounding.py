"""Rounding piece by piece is rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.models import rounding
from ptq.models.rounding import beyond, round_in_place


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Returns values around the greatest of fp16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3e4


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 99), st.booleans(), st.integers(1, 20))
def test_pieces_of_any_size_and_layout_give_the_bits_of_the_whole(shape, seed, turned, piece):
    tensor = values(tuple(shape), seed)
    if turned:
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "PIECE", piece)
        assert beyond(tensor, torch.float16) == bool((tensor.abs() > 65504).any())
        expected = tensor.half().float()
        round_in_place(tensor, torch.float16)
    assert tensor.equal(expected)


def test_what_the_type_holds_is_not_beyond_it():
    assert not beyond(torch.tensor([65504.0, -65504.0, float("nan")]), torch.float16)
    assert beyond(torch.tensor([1.0, -65505.0]), torch.float16)
    assert beyond(torch.tensor([float("inf")]), torch.float16)
    assert not beyond(torch.tensor([1e30]), torch.bfloat16)
