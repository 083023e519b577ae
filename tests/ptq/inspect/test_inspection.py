"""`ptq inspect`: what it says of good files, and one line without an allocation for hostile ones."""

import json
import os
import pathlib
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ptq.cli.app import main
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.export import to_kuiper, to_llama2c
from ptq.inspect.inspection import inspect
from quantize.spec.quant_spec import QuantSpec

GROUPS = QuantSpec(granularity="group", group_size=16)
INPUTS = QuantSpec(granularity="group", group_size=16, dynamic=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory, llama_model, quantized):
    """One small file of every kind, by name."""
    import gguf

    folder = tmp_path_factory.mktemp("files")
    to_llama2c.Exporter(to_llama2c.Options(False)).write(
        quantized(llama_model(), SchemeConfig(weight=GROUPS, input=INPUTS)), folder / "llama2c.bin"
    )
    to_kuiper.Exporter(to_kuiper.Options()).write(
        quantized(llama_model(), SchemeConfig(weight=GROUPS)), folder / "kuiper.bin"
    )
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_array("tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    blocks = gguf.quantize(np.ones((4, 64), np.float32) * 3, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(
        {"a.codes": torch.ones(4, 4, dtype=torch.int8), "a.scale": torch.full((4, 1), 0.5)}, folder / "s.safetensors"
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_name(report):
    return {tensor.name: tensor for tensor in report.tensors}


def test_a_llama2c_file_is_described(tmp_path, files):
    (tmp_path / "m.bin").write_bytes(files["llama2c.bin"])
    report = inspect(tmp_path / "m.bin")
    assert report.format == "llama2.c version 2" and report.bytes == len(files["llama2c.bin"])
    assert (report.header["dim"], report.header["kv_heads"], report.header["shared"]) == (32, 2, True)
    tensors = by_name(report)
    assert tensors["layers.1.w2"].shape == (32, 48) and tensors["layers.1.w2"].bytes == 32 * 48 * 5 // 4
    assert 0 < tensors["tok_embeddings"].greatest_error < 1 and tensors["final_norm"].greatest_error is None
    assert 256 + sum(t.bytes for t in report.tensors) == report.bytes


def test_the_greatest_error_bounds_what_rounding_did(tmp_path, llama_model, quantized):
    model = llama_model(tied=False)
    weight = model.lm_head.weight.clone()
    source = quantized(model, SchemeConfig(weight=GROUPS))
    to_kuiper.Exporter(to_kuiper.Options()).write(source, tmp_path / "m.bin")
    from ptq.inspect.q8_readers import open_kuiper

    error = (open_kuiper(tmp_path / "m.bin").read("output") - weight).abs().max()
    bound = by_name(inspect(tmp_path / "m.bin"))["output"].greatest_error
    assert bound * 0.8 < error <= bound * 1.0001


def test_gguf_and_safetensors_files_are_described(tmp_path, files):
    (tmp_path / "m.gguf").write_bytes(files["model.gguf"])
    report = inspect(tmp_path / "m.gguf")
    assert report.header["general.architecture"] == "llama" and report.header["tokens"] == "2 values"
    w = by_name(report)["w"]
    assert (w.shape, w.type, w.bytes) == ((4, 64), "Q8_0", 4 * 2 * 34)
    assert w.greatest_error == pytest.approx(float(np.float16(3 / 127)) / 2)
    (tmp_path / "s.safetensors").write_bytes(files["s.safetensors"])
    codes = by_name(inspect(tmp_path))["a.codes"]
    assert (codes.type, codes.greatest_error) == ("int8", 0.25)


def test_the_command_prints_tables_and_refuses_with_one_line(tmp_path, files, capsys):
    (tmp_path / "m.bin").write_bytes(files["kuiper.bin"])
    assert main(["inspect", str(tmp_path / "m.bin")]) == 0
    out = capsys.readouterr().out
    assert "KuiperLLama int8" in out and "layers.0.wq" in out and "greatest error" in out
    for path in ("nowhere.bin", "."):
        assert main(["inspect", str(tmp_path / path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def refused(path):
    """Whether `inspect` gave one line; nothing else may be raised."""
    try:
        inspect(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return True
    return False


@pytest.mark.parametrize("name", ["llama2c.bin", "kuiper.bin", "model.gguf", "s.safetensors"])
def test_every_truncation_is_refused(tmp_path, files, name):
    data = files[name]
    path = tmp_path / name
    # A GGUF file may end with up to 31 bytes of padding, which nobody misses.
    for length in [*range(0, min(len(data), 300), 7), len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:length])
        assert refused(path), length


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["llama2c.bin", "kuiper.bin", "model.gguf", "s.safetensors"]),
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_damaged_headers_never_raise_anything_else_nor_allocate(tmp_path, files, name, edits):
    data = bytearray(files[name])
    for position, value in edits:
        data[position : position + len(value)] = value
    path = tmp_path / name
    path.write_bytes(data)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + 2_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([-(2**31), -1, 0, 1, 2, 4, 64, 2**16, 2**31 - 1]), min_size=9, max_size=9), st.booleans()
)
def test_sizes_that_overflow_or_are_negative_are_refused(tmp_path, sizes, llama2c):
    path = tmp_path / "m.bin"
    head = struct.pack("<Ii7iBi", 0x616B3432, 2, *sizes[:7], 1, sizes[7]) if llama2c else struct.pack("<8i", *sizes[:8])
    path.write_bytes(head.ljust(300, b"\0"))
    assert refused(path)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"hello, world, this is a text file\n" * 20, b"PK\x03\x04" + b"\0" * 100, b"ak42" + b"\xff" * 20,
        struct.pack("<Q", 2**63) + b"{}" * 10, struct.pack("<Q", 4) + b"{{{{" * 3,
        b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"k" * 50,
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60) + b"\0" * 64,
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + b"\x09\0\0\0" * 4000,
        b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 2**40, 2**40, 0, 0),
    ],
    ids=range(13),
)  # fmt: skip
def test_foreign_and_hostile_files_get_one_line(tmp_path, data):
    (tmp_path / "m").write_bytes(data)
    assert refused(tmp_path / "m")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        [],
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    assert refused(tmp_path / "m.safetensors")


def test_a_scale_that_is_no_number_is_refused(tmp_path, files):
    data = bytearray(files["kuiper.bin"])
    data[32 + 32 * 32 : 32 + 32 * 32 + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: layers.0.wq holds a scale"):
        inspect(tmp_path / "m.bin")


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, pathlib.Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_inside_a_folder_is_named_and_not_waited_for(tmp_path, files, name, make):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "real.safetensors").write_bytes(files["s.safetensors"])
    assert inspect(folder).tensors
    make(folder / name)
    with pytest.raises(UserError, match=f"{name}: no file, though it has the name of one"):
        inspect(folder)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        inspect(tmp_path / "pipe")
