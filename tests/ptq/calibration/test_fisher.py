"""The Fisher information by a pass backward through blocks: against plain autograd through the whole model, and its own definition."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from ptq.calibration import fisher
from ptq.calibration.fisher import backward, block_inputs, cost_of_rows, fisher_root, output_gradients
from ptq.calibration.kept_outputs import KeptOutputs
from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.models.loading import load
from ptq.network.block_stream import BlockStream
from ptq.network.network import build_network, weight_of
from ptq.testing import byte_tokenizer, random_tiny


def test_the_random_vectors_have_the_covariance_of_the_softmax_and_tokens_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 3.0, -2.0]])
    draws = torch.stack([fisher_root(logits, generator) for _ in range(6000)]).double()
    p = torch.softmax(logits.double(), -1)
    for token in range(2):
        found = torch.einsum("da,db->ab", draws[:, token], draws[:, token]) / len(draws)
        assert torch.allclose(found, torch.diag(p[token]) - torch.outer(p[token], p[token]), atol=0.02)
    across = torch.einsum("da,db->ab", draws[:, 0], draws[:, 1]) / len(draws)
    assert across.abs().max() < 0.02 and draws.mean(0).abs().max() < 0.02


def test_the_cost_of_rows_is_the_square_of_each_rows_change():
    error, gradient = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert float(cost_of_rows(error, gradient)) == pytest.approx(
        sum(float(e @ g) ** 2 for e, g in zip(error, gradient, strict=True))
    )


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("weights", ["resident", "offloaded"])
def test_the_sums_are_the_squared_gradients_of_every_sample_by_plain_autograd(kind, weights, tmp_path):
    random_tiny(kind).save_pretrained(tmp_path, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    found = _by_blocks(tmp_path, ids, weights)
    expected = _by_autograd(tmp_path, ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert torch.allclose(found[name], value, rtol=2e-3, atol=1e-5 * scale), name


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "gemma3", "mixtral"])
def test_gradients_multiplied_in_bfloat16_are_those_of_plain_autograd_but_for_its_rounding(kind, tmp_path):
    random_tiny(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    found = _by_blocks(tmp_path, ids, "resident", dtype=torch.bfloat16)
    expected = _by_autograd(tmp_path, ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert 0 < float((found[name] - value).norm()) < 0.05 * float(value.norm()), name


def test_gradients_are_of_bfloat16_where_a_float32_models_device_multiplies_it_faster(monkeypatch):
    cpu = torch.device("cpu")
    for faster in (True, False):
        monkeypatch.setattr(fisher, "multiplies_bfloat16", lambda device, faster=faster: faster)
        assert fisher.gradients_dtype(cpu, torch.float32) == (torch.bfloat16 if faster else None)
        assert (
            fisher.gradients_dtype(cpu, torch.float16) is None and fisher.gradients_dtype(cpu, torch.bfloat16) is None
        )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_kept_outputs_are_the_bits_that_are_multiplied_again_where_there_is_no_room(tmp_path, kind, monkeypatch):
    random_tiny(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    wanted = _by_blocks(tmp_path, ids, "resident")
    taken, take = [], KeptOutputs.take

    def counted(self, name):
        found = take(self, name)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(KeptOutputs, "take", counted)
    shares = []
    network = _network(tmp_path).network
    rows = sum(weight_of(linear).shape[0] for linear in network.blocks[0].linears.values())
    for room in (0, 4 * ids.numel() * rows, 1 << 40):
        taken.clear()
        found = _by_blocks(tmp_path, ids, "resident", KeptOutputs(room))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        shares.append(sum(taken) / len(taken))
    assert shares[0] == 0 and shares[2] == 1 and 0.3 < shares[1] < 0.7


def test_what_is_kept_is_what_was_given_whatever_becomes_of_it_and_is_taken_once_in_the_order_of_the_calls():
    outputs, linear = KeptOutputs(1 << 20), torch.nn.Linear(4, 4)
    flow = SimpleNamespace(ids=torch.zeros(1, 3, dtype=torch.int64), hidden=torch.zeros(1, 3, 4))
    assert not KeptOutputs(47).open({"linear": linear}, flow) and outputs.open({"linear": linear}, flow)
    given = [
        torch.full((rows, 4), float(rows)) for rows in (2, 1, 2)
    ]  # More than were counted: they are kept all the same.
    for y in given:
        assert outputs.keep("linear", y) is y
        y.zero_()
    for rows in (2, 1, 2):
        assert torch.equal(outputs.take("linear"), torch.full((rows, 4), float(rows)))
    assert outputs.take("linear") is None and outputs.take("another") is None


def _network(folder, weights="resident"):
    loaded = load(ModelConfig(str(folder), dtype="float32"), ExecutionConfig(weights=weights))
    network = build_network(loaded.model)
    return BlockStream(network, loaded.weights, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_gradients_of_a_batch_are_the_sum_of_its_samples(tmp_path, kind):
    random_tiny(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    plain, together = [], []
    _by_blocks(tmp_path, ids, "resident", each=plain)
    _by_blocks(tmp_path, ids, "resident", each=together, batch_size=4)
    assert len(together) * 4 == len(plain)
    for i, batch in enumerate(together):
        samples = plain[4 * i : 4 * i + 4]
        for name, gradient in batch.items():
            expected = sum(sample[name] for sample in samples if name in sample)
            scale = float(expected.abs().max())
            assert torch.allclose(gradient, expected, rtol=2e-3, atol=1e-5 * scale), name


def _by_blocks(folder, ids, weights, outputs=None, each=None, batch_size=1, dtype=None):
    stream = _network(folder, weights)

    @contextmanager
    def shown(block):
        with stream.weights.hold([block.name]):
            yield

    flow = stream.open(ids, batch_size)
    inputs = block_inputs(stream, flow, shown, outputs=outputs)
    gradients = output_gradients(stream, flow.hidden, chunk=100, seed=5, dtype=dtype)
    found = {}

    def seen(sums):
        if each is not None:
            each.append({name: gradient.clone() for name, gradient in sums.items()})
        for name, gradient in sums.items():
            found[name] = found.get(name, 0) + gradient.square()

    backward(stream, flow, inputs, gradients, shown, lambda block: seen, outputs, dtype)
    return found


def _by_autograd(folder, ids):
    """One backward pass of transformers' own code for each sample, with the same random vectors."""
    stream = _network(folder)
    network, generator = stream.network, torch.Generator().manual_seed(5)
    weights = {name: module.weight for name, module in network.linears.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    totals = {}
    for sample in ids:
        logits = network.model(input_ids=sample[None], use_cache=False).logits[:, :-1]
        v = fisher_root(logits.detach(), generator)
        gradients = torch.autograd.grad((logits * v).sum(), list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None and bool(gradient.any()):
                square = gradient.square()
                conv = isinstance(network.linears[name], Conv1D)  # keeps (in, out)
                totals[name] = totals.get(name, 0) + (square.t() if conv else square)
    return totals
