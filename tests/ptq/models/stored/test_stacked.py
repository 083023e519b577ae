"""Experts that a checkpoint holds one by one are read from where they lie: the model's bits, and no second copy on disk."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.files.safetensors_file import StoredTensor
from ptq.models import checkpoint
from ptq.models.loading import load
from ptq.network.network import build_network
from ptq.testing import byte_tokenizer, random_tiny

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")


def saved(architecture, folder):
    random_tiny(architecture).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def unconverted(monkeypatch):
    """Fails where transformers would write or read the weights."""

    def refused(*args):
        raise RuntimeError("transformers converts the checkpoint")

    for name in ("_converted", "_pretrained"):
        monkeypatch.setattr(checkpoint, name, refused)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_every_weight_is_that_of_transformers_and_is_read_once(architecture, tmp_path, unconverted, monkeypatch):
    folder = saved(architecture, tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    resident = load(ModelConfig(str(folder), dtype="float32"), ExecutionConfig("cpu", "resident")).model
    assert all(torch.equal(t, expected[name]) for name, t in resident.state_dict().items())
    loaded = load(ModelConfig(str(folder), dtype="float32"), ExecutionConfig("cpu", "offloaded", prefetch=False))
    network = build_network(loaded.model)
    loaded.weights.take_apart(network.pieces)
    reads, read = [], StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self, *a: reads.append((self.file, self.start)) or read(self, *a))
    for block in network.blocks:
        with loaded.weights.hold([block.name]):
            for name, tensor in block.module.state_dict(prefix=f"{block.name}.").items():
                piece = network.pieces.get(name)
                if piece is None:
                    assert torch.equal(tensor, expected[name]), name
                else:
                    assert torch.equal(tensor, piece.of(expected[piece.source].view(piece.shape)[piece.expert])), name
    assert len(reads) == len(set(reads))


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path):
    folder = saved("qwen3_moe", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if ".experts.1.up_proj" in name)
    shard = folder / index["weight_map"].pop(name)
    save_file({key: t for key, t in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for weights in ("resident", "offloaded"):
        with pytest.raises((UserError, RuntimeError)):
            load(ModelConfig(str(folder), dtype="float32"), ExecutionConfig("cpu", weights))
