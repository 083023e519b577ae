"""Q8_0 in flat groups, as llama2.c quantizes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.q8_0 import decode_flat, encode_flat


def test_the_notes_example_of_groups_of_two_comes_out():
    codes, scales, error = encode_flat(torch.tensor([3.0, 5.0, 2.0, 4.0]), 2)
    assert codes.tolist() == [76, 127, 64, 127]
    assert scales.tolist() == pytest.approx([5 / 127, 4 / 127])
    assert error == pytest.approx(max(abs(3 - 76 * 5 / 127), abs(2 - 64 * 4 / 127)))


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 8, 64]), st.integers(0, 999))
def test_groups_run_through_rows_and_the_greatest_error_is_reported(rows, factor, size, seed):
    values = np.random.default_rng(seed).normal(size=(rows, factor * size)).astype(np.float32)
    codes, scales, error = encode_flat(torch.from_numpy(values), size)
    groups = values.reshape(-1, size).astype(np.float64)
    step = np.abs(groups).max(-1, keepdims=True) / 127
    assert np.allclose(scales.numpy(), step[:, 0], rtol=1e-6)
    assert np.abs(codes.numpy().reshape(-1, size) - groups / step).max() <= 0.5 + 1e-4
    decoded = decode_flat(codes, scales).numpy().reshape(groups.shape)
    assert error == pytest.approx(np.abs(decoded - groups).max(), abs=1e-7)


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="^group_size: 64 does not divide the 100 values of the tensor$"):
        encode_flat(torch.ones(10, 10), 64)
