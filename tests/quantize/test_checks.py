"""The quick check for NaN and inf, against looking at every element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.checks import all_finite


@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38]), max_size=8
    )
)
def test_the_quick_check_agrees_with_looking_at_every_element(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert all_finite(x) == bool(torch.isfinite(x).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_great_but_finite_numbers_pass(dtype):
    x = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)
    x[1, 2] = float("nan")
    assert not all_finite(x)
