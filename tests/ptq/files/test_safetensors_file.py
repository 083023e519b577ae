"""Tensors of any layout go into a file and come back as they were."""

import math
import pathlib
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ptq.errors import UserError
from ptq.files.safetensors_file import DTYPES, read_header, write_as_they_come, write_one_by_one, write_tensors

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


@given(
    st.dictionaries(st.text(max_size=4), st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.randoms(),
)
def test_tensors_written_one_by_one_are_what_safetensors_reads_whatever_their_order(
    tmp_path_factory, shapes, dtype, order
):
    shapes = {name: shape for name, shape in shapes.items() if name != "__metadata__"}
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {name: torch.randn((2, *shape)).mul(9).to(dtype)[1] for name, shape in shapes.items()}
    coming = list(tensors.items())
    order.shuffle(coming)
    write_one_by_one(path, shapes, dtype, coming, {"format": "pt"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == dtype and read[name].equal(tensor) for name, tensor in tensors.items())
    assert {name: stored.shape for name, stored in read_header(path).items()} == shapes


@pytest.mark.parametrize(
    "coming", [[], [("a", BASE)], [("a", BASE[0].double())], [("b", BASE[0])], [("a", BASE[0]), ("a", BASE[0])]]
)
def test_tensors_that_are_not_those_that_were_announced_make_no_file(tmp_path, coming):
    with pytest.raises(ValueError):
        write_one_by_one(tmp_path / "x.safetensors", {"a": (6,)}, torch.float32, coming)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_tensors_that_come_one_after_the_other_are_read_by_safetensors(kinds):
    tensors = {
        f"block.{i}": torch.arange(math.prod(shape)).reshape(shape).to(DTYPES[code])
        for i, (code, shape) in enumerate(kinds)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "shard.safetensors"
        write_as_they_come(path, iter(tensors.items()), len(tensors), {"format": "pt"})
        loaded, header = load_file(path), read_header(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert loaded.keys() == tensors.keys() == header.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype == header[name].dtype and loaded[name].shape == tensor.shape
        assert loaded[name].view(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_more_names_than_there_is_room_for_are_refused(tmp_path):
    tensors = ((f"{'long' * 40}.{i}", torch.zeros(1)) for i in range(64))
    with pytest.raises(ValueError, match="there is room for"):
        write_as_they_come(tmp_path / "shard.safetensors", tensors, 2)
