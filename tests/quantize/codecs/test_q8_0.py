"""Q8_0 of flat groups against numpy written from its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.codecs.q8_0 import decode_flat, encode_flat


def test_the_example_of_the_notes():
    codes, scales, _ = encode_flat(torch.tensor([[3.0, 5.0], [2.0, 4.0]]), 2)
    assert codes.tolist() == [76, 127, 64, 127]
    assert torch.equal(scales, torch.tensor([5 / 127, 4 / 127]))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8, 64]), st.floats(-30, 30))
def test_codes_scales_and_error_are_what_the_definition_says(seed, group_size, exponent):
    w = (np.random.default_rng(seed).standard_normal((4, 64)) * 10.0**exponent).astype(np.float32)
    codes, scales, error = encode_flat(torch.from_numpy(w), group_size)
    groups = w.reshape(-1, group_size)
    scale = np.abs(groups).max(1) / np.float32(127)
    expected = np.rint(groups / scale[:, None])
    assert codes.dtype == torch.int8 and np.array_equal(codes.numpy(), expected.reshape(-1))
    assert np.array_equal(scales.numpy(), scale)
    back = decode_flat(codes, scales).numpy()
    assert error == np.abs(back - w.reshape(-1)).max() <= scale.max() / 2 * 1.0001


def test_zero_and_subnormal_groups_become_zero():
    codes, scales, error = encode_flat(torch.tensor([0.0, 0.0, 1e-40, 0.0, 1.0, 0.5]), 2)
    assert codes.tolist() == [0, 0, 0, 0, 127, 64] and torch.isfinite(scales).all() and error < 0.01


@pytest.mark.parametrize(
    ("weight", "size"), [(torch.zeros(6), 4), (torch.zeros(4), 0), (torch.tensor([1.0, torch.nan]), 2)]
)
def test_what_cannot_be_encoded_is_refused(weight, size):
    with pytest.raises(ValueError):
        encode_flat(weight, size)
