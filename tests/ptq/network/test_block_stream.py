"""The one loop: resident or offloaded, hidden states in memory or on disk, the same result."""

import pytest
import torch
from safetensors.torch import load_file

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.models.loading import load
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import build_network
from ptq.network.stream.parts import in_parts
from ptq.testing import byte_tokenizer, random_tiny


@pytest.fixture(params=["opt", "llama", "gpt2", "gemma3"])
def folder(request, tmp_path):
    random_tiny(request.param).half().save_pretrained(tmp_path, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def _final(folder, weights, hidden_states, batch_size=2):
    loaded = load(ModelConfig(str(folder)), ExecutionConfig(weights=weights, device="cpu"))
    network = build_network(loaded.model)
    stream = BlockStream(network, loaded.weights, torch.device("cpu"), hidden_states)
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    flow = stream.open(ids, batch_size)
    stream.run([flow], Nothing())
    with stream.head() as head:
        logits = head(flow.hidden)
    result = flow.hidden.clone(), logits.clone()
    stream.close()
    return network, result


@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
def test_offloaded_weights_give_the_same_bits_as_resident_ones(folder, hidden_states):
    _, (expected, expected_logits) = _final(folder, "resident", "memory")
    _, (hidden, logits) = _final(folder, "offloaded", hidden_states)
    assert torch.equal(hidden, expected)
    assert torch.equal(logits, expected_logits)


def test_offloaded_weights_leave_no_block_in_memory(folder):
    network, _ = _final(folder, "offloaded", "memory")
    assert all(p.device.type == "meta" for block in network.blocks for p in block.module.parameters())


def test_the_batch_size_changes_nothing_beyond_rounding(folder):
    _, (one, _) = _final(folder, "resident", "memory", batch_size=1)
    _, (three, _) = _final(folder, "resident", "memory", batch_size=3)
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "falcon", "gpt2", "mixtral"])
def test_parts_of_a_batch_give_what_the_batch_gives(architecture):
    network = build_network(random_tiny(architecture))
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    ids = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    flow = stream.calibration(ids, 4)
    parts = in_parts(stream, flow, 2)
    assert len(parts.calls) == 3 and in_parts(stream, flow, 4) is flow
    for block in network.blocks:
        with torch.no_grad():
            by_part = [stream.call(parts, block, i, flow.hidden[rows]) for i, rows in parts.slices()]
            stream.step(flow, block)
        torch.testing.assert_close(torch.cat(by_part), flow.hidden)
    assert parts.experts is None or not parts.experts.seen
    with pytest.raises(ValueError, match="size: 3 does not divide a batch of 4"):
        in_parts(stream, flow, 3)


def test_a_memory_mapped_file_goes_when_the_stream_is_closed(folder):
    loaded = load(ModelConfig(str(folder)), ExecutionConfig(device="cpu"))
    stream = BlockStream(build_network(loaded.model), loaded.weights, torch.device("cpu"), "disk")
    stream.open(torch.ones(2, 4, dtype=torch.long), 1)
    scratch = [s.name for s in stream._scratch]
    stream.close()
    import pathlib

    assert scratch and not any(pathlib.Path(s).exists() for s in scratch)


def test_the_checkpoints_own_tensors_are_what_is_computed_with(folder):
    loaded = load(ModelConfig(str(folder)), ExecutionConfig(device="cpu"))
    stored = {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}
    parameters = dict(loaded.model.named_parameters())
    shared = [name for name in stored if name in parameters]
    assert loaded.baseline_dtype == "fp16" and loaded.arithmetic_dtype == "fp32"
    assert all(torch.equal(parameters[name], stored[name].float()) for name in shared)


def _carried(model, ids):
    network = build_network(model)
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    flow = stream.open(ids, 2)
    stream.run([flow], Nothing())
    return flow


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_block_where_nan_or_inf_began_is_named(bad, dtype):
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    assert _carried(random_tiny("llama").to(dtype), ids).first_nonfinite() is None
    model = random_tiny("llama").to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = bad
    assert _carried(model, ids).first_nonfinite() == "model.layers.1"
    with torch.no_grad():
        model.model.embed_tokens.weight[int(ids[2, 4])] = bad
    assert _carried(model, ids).first_nonfinite() == "embedding"


def test_a_single_token_of_a_later_batch_is_seen():
    ids = torch.full((5, 12), 7)
    ids[4, 11] = 60
    model = random_tiny("opt").half()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[60, 0] = torch.inf
    flow = _carried(model, ids)
    assert torch.isfinite(flow.hidden[:4]).all()
    assert flow.first_nonfinite() == "embedding"


def test_huge_numbers_that_are_finite_are_not_taken_for_inf():
    model = random_tiny("opt")
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[:, 0] = 1e38
    flow = _carried(model, torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1)))
    assert flow.finite[""].item()
