"""Tensors of any layout go into a file and come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ptq.errors import UserError
from ptq.files.safetensors_file import write_tensors

BASE = torch.arange(24.0).view(4, 6)
LAYOUTS = {
    "whole": BASE,
    "the same again": BASE,
    "a view": BASE.view(-1),
    "rows": BASE[1:3],
    "columns": BASE[:, 2:4],
    "transposed": BASE.t(),
    "expanded": BASE[:1].expand(5, 6),
    "scalar": BASE[2, 3],
    "nothing": BASE[:0],
    "trainable": torch.nn.Parameter(BASE),
    "labels": torch.arange(6),
}


@given(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, unique=True))
def test_tensors_that_share_memory_are_written_each_with_its_values(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    write_tensors(path, {name: LAYOUTS[name] for name in names}, {"kind": "test"})
    read = load_file(path)
    assert read.keys() == set(names) and all(torch.equal(read[name], LAYOUTS[name]) for name in names)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"kind": "test"}


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": BASE})
    with pytest.raises(UserError, match="cannot be written"):
        write_tensors(path / "below", {"x": BASE})
    assert torch.equal(load_file(path)["x"], BASE)
