"""Weights that are read while the block before computes: the same bits, one block ahead, and an error where a file breaks."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from ptq.config.building import recipe_from
from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.files.safetensors_file import StoredTensor, read_header
from ptq.models.loading import load
from ptq.models.read_ahead import ReadAhead, waiting_type, widened
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import build_network
from ptq.run.experiment import run
from tests.tools.same_bits import results, same


@pytest.fixture
def reads(monkeypatch):
    """(thread, bytes) of every read of a stored tensor."""
    found, read = [], StoredTensor.read

    def noted(self, *args):
        found.append((threading.current_thread().name, self.end - self.start))
        return read(self, *args)

    monkeypatch.setattr(StoredTensor, "read", noted)
    return found


def recipe(folder, model, prefetch):
    return recipe_from(
        {
            "name": "prefetch",
            "model": {"path": str(model)},
            "calibration": {"samples": 4, "length": 32},
            "evaluation": {"windows": 2, "length": 32},
            "scheme": {"weight": {"bits": 4}},
            "steps": {"gptq": {}},
            "execution": {"weights": "offloaded", "save": True, "prefetch": prefetch},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
    )


def test_reading_ahead_changes_no_bit(tmp_path, tiny_mixtral, reads):
    ahead = run(recipe(tmp_path / "on", tiny_mixtral, True))
    on = list(reads)
    reads.clear()
    behind = run(recipe(tmp_path / "off", tiny_mixtral, False))
    same(results(ahead, "identity"), results(behind, "identity"))
    # Nothing is read twice for it, and of each pass all blocks but the first are read by the thread.
    assert sum(size for _, size in on) == sum(size for _, size in reads)
    assert {thread for thread, _ in reads} == {"MainThread"}
    threaded = sum(size for thread, size in on if thread == "read ahead")
    assert threaded > 0.3 * sum(size for _, size in on)


def test_one_block_lies_ahead_and_goes_when_another_is_wanted(tiny_llama):
    loaded = load(ModelConfig(str(tiny_llama)), ExecutionConfig("cpu", "offloaded"))
    network, weights = build_network(loaded.model), loaded.weights
    stream = BlockStream(network, weights, torch.device("cpu"))
    names = [block.name for block in network.blocks]
    weights.prefetch(names[:1])
    weights.prefetch(names[1:2])
    assert weights._reading.names[0].startswith(names[1])
    with weights.hold(names[:1]):
        assert weights._reading is not None
        assert all(not p.is_meta for p in network.blocks[0].module.parameters())
    with weights.hold(names[1:2]):
        assert weights._reading is None
    stream.run([stream.open(torch.arange(8)[None], 1)], Nothing())
    assert weights._reading is None
    assert all(p.is_meta for p in network.blocks[0].module.parameters())


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_file_that_breaks_on_the_way_is_named_and_the_mended_run_goes_on(
    tmp_path, tiny_llama, monkeypatch, every_block, prefetch, how
):
    import shutil

    from ptq.run.kept.kept_pass import KeptPass

    expected = results(run(recipe(tmp_path / "whole", tiny_llama, prefetch)))
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    shard, whole, keep = model / "model.safetensors", (model / "model.safetensors").read_bytes(), KeptPass.keep

    def broken(self, block):
        keep(self, block)
        if self.folder.name == "quantize" and block.index == 1:
            shard.write_bytes(whole[: len(whole) // 3]) if how == "cut" else shard.unlink()

    monkeypatch.setattr(KeptPass, "keep", broken)
    said = "became shorter" if how == "cut" else "No such file"
    with pytest.raises(UserError, match=f"model.safetensors, which holds model.layers.*{said}.*takes it up"):
        run(recipe(tmp_path / "broken", model, prefetch))
    monkeypatch.setattr(KeptPass, "keep", keep)
    shard.write_bytes(whole)
    folder = run(recipe(tmp_path / "broken", model, prefetch))
    assert "resumed after block" in (folder / "run.log").read_text()
    found = results(folder)
    assert found[1:2] == expected[1:2]
    same((None, *found[1:]), (None, *expected[1:]))


def test_what_cannot_be_read_ahead_is_left_to_whoever_needs_it():
    def read(name, device):
        if name == "b":
            raise UserError("broken")
        return torch.ones(1)

    assert list(ReadAhead(["a", "b", "c"], read, torch.device("cpu")).result()) == ["a"]


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("rounding", FLOATS[1:])
@pytest.mark.parametrize("arithmetic", FLOATS[1:])
def test_a_tensor_that_waits_in_fewer_bits_comes_out_as_one_that_is_read_at_once(
    tmp_path, stored, rounding, arithmetic
):
    # Values around the middle between two numbers of 16 bits, where rounding twice differs from rounding once.
    steps = torch.tensor([2.0**-11, 2.0**-8]).to(torch.float64)
    values = (1 + steps[:, None] * (1 + torch.linspace(-1e-3, 1e-3, 257, dtype=torch.float64) ** 3)).to(stored)
    save_file({"w": values}, tmp_path / "w.safetensors")
    tensor = read_header(tmp_path / "w.safetensors")["w"]
    cpu = torch.device("cpu")
    at_once = tensor.read(rounding, arithmetic, cpu)
    waited = widened({"w": tensor.read(rounding, waiting_type(stored, rounding, arithmetic), cpu)}, arithmetic)("w")
    assert waited.dtype == arithmetic
    assert torch.equal(waited, at_once)


def test_what_waits_takes_two_bytes_a_weight_where_the_model_has_sixteen_bits(tiny_llama):
    loaded = load(ModelConfig(str(tiny_llama), dtype="float16"), ExecutionConfig("cpu", "offloaded"))
    block = next(iter(build_network(loaded.model).blocks)).name
    loaded.weights.prefetch([block])
    assert {t.dtype for t in loaded.weights._reading.result().values()} == {torch.float16}


def test_tensors_that_share_their_memory_share_it_when_widened_and_integers_stay():
    tied, number = torch.ones(2, dtype=torch.float16), torch.tensor([1, 2])
    take = widened({"a": tied, "b": tied, "c": number}, torch.float32)
    assert take("a") is take("b")
    assert take("c") is number
