"""Experts are Linears, whatever holds them: the same logits, the same code around them, on every mixture."""

import copy

import pytest
import torch
import transformers
from torch import nn

from ptq.config.schema import ExecutionConfig, ModelConfig, SchemeConfig
from ptq.models.loading import load
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.experts.linears import part_names
from ptq.network.experts.routing import with_others
from ptq.network.experts.stand_in import Unsupported
from ptq.network.experts.trace import FusedExperts, find_mixtures
from ptq.network.links import trace_links
from ptq.network.network import build_network, weight_of
from ptq.run.in_memory import quantize
from ptq.testing import MIXTURES, byte_tokenizer, random_tiny
from quantize.spec.quant_spec import QuantSpec


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 60, (3, 14), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def _logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", MIXTURES)
def test_logits_are_the_same_before_and_after_experts_are_seen_as_linears(architecture, ids):
    model = random_tiny(architecture)
    before, count = _logits(model, ids), sum(p.numel() for p in model.parameters())
    network = build_network(model)
    after = _logits(model, ids)
    # Biased products of interleaved rows are summed in another order (gpt-oss); the others are the last bit's.
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert architecture == "gpt_oss" or torch.equal(after, before)
    assert sum(p.numel() for p in model.parameters()) == count == network.parameters
    experts = [names for block in network.blocks for names in block.experts.values()]
    assert experts and all(len(names) == 3 or architecture == "jetmoe" for names in experts)
    assert network.coverage() is None or architecture == "jetmoe"


@pytest.mark.parametrize("architecture", MIXTURES)
def test_what_is_found_without_weights_is_what_is_found_with_them(architecture):
    model = random_tiny(architecture)
    with torch.device("meta"):
        bare = build_network(transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config)))
    network = build_network(model)
    assert bare.shapes == network.shapes and list(bare.linears) == list(network.linears)
    assert [list(b.gates) for b in bare.blocks] == [list(b.gates) for b in network.blocks]
    assert bare.pieces == network.pieces


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_network_of_a_network_and_of_a_copy_is_the_same(architecture, ids):
    model = random_tiny(architecture)
    network, before = build_network(model), _logits(model, ids)
    other = copy.deepcopy(model)
    assert list(build_network(other).linears) == list(build_network(model).linears) == list(network.linears)
    with torch.no_grad():
        for module in build_network(other).linears.values():
            weight_of(module).zero_()
    assert torch.equal(_logits(model, ids), before) and not torch.equal(_logits(other, ids), before)


def test_every_part_of_an_expert_is_the_one_that_its_name_says():
    model = random_tiny("gpt_oss")
    fused = model.model.layers[0].mlp.experts
    weight, bias = fused.gate_up_proj.clone(), fused.gate_up_proj_bias.clone()
    network = build_network(model)
    gate, up = (network.linears[f"model.layers.0.mlp.experts.4.{part}_proj"] for part in ("gate", "up"))
    assert torch.equal(gate.weight, weight[4, :, 0::2].t()) and torch.equal(up.weight, weight[4, :, 1::2].t())
    assert torch.equal(gate.bias, bias[4, 0::2]) and torch.equal(up.bias, bias[4, 1::2])


def test_halves_are_named_for_what_they_do_and_not_for_their_order():
    fused = FusedExperts("experts", "w13", (4, 8, 6), False, halves="stacked", gate_first=False)
    assert part_names(fused) == [("up_proj", (0, 4, None)), ("gate_proj", (4, None, None))]


class _Backwards(nn.Module):
    """A mixture of somebody's: up before gate, one matrix after another through einsum-free products, a list of scores."""

    def __init__(self, flawed=False):
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.up_gate = nn.Parameter(torch.randn(3, 8, 12))
        self.out = nn.Parameter(torch.randn(3, 6, 8))
        self.flawed = flawed

    def forward(self, hidden):
        x = hidden.reshape(-1, 8)
        chosen = self.router(x).softmax(-1).topk(1, -1)
        total = torch.zeros_like(x)
        for number in range(3):
            rows = (chosen.indices[:, 0] == number).nonzero()[:, 0]
            matrix = self.up_gate[number]
            up, gate = (x[rows] @ (matrix * 2 if self.flawed else matrix)).chunk(2, -1)
            total[rows] = (up * torch.tanh(gate)) @ self.out[number] * chosen.values[rows]
        return total.view_as(hidden)


def test_a_mixture_that_nobody_has_seen_before_is_told_by_what_it_does():
    block = nn.Module()
    block.mixture = _Backwards()
    [mixture] = find_mixtures(block, 8)
    halves = {f.name: (f.halves, f.gate_first, f.flipped) for f in mixture.fused}
    assert halves == {"up_gate": ("stacked", False, True), "out": ("", True, True)}
    assert mixture.gates == ("mixture.router",) and mixture.experts == 3
    assert "up_gate" in block.mixture._parameters, "looking changes nothing"


def test_a_mixture_that_does_more_than_multiply_is_left_alone():
    block = nn.Module()
    block.mixture = _Backwards(flawed=True)
    assert find_mixtures(block, 8) == []


def test_a_module_that_takes_another_way_than_it_showed_is_stopped_and_not_wrong():
    model = random_tiny("mixtral")
    network = build_network(model)
    experts = network.model.model.layers[0].mlp.experts
    with pytest.raises(Unsupported, match="gate_up_proj"):
        torch.relu(experts.gate_up_proj)
    with pytest.raises(Unsupported, match="indexed by"):
        experts.gate_up_proj[torch.tensor([0.5])]


@pytest.mark.parametrize("architecture", sorted(set(MIXTURES) - {"jetmoe"}))
def test_one_norm_is_read_by_the_router_all_experts_and_the_shared_one(architecture):
    network = build_network(random_tiny(architecture))
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    traces = trace_links(network, stream, sums=True)
    block = next(b for b in network.blocks if b.mixtures)
    trace = traces[block.index]
    first = {names[0] for names in block.experts.values()}
    [norm] = [link for link in trace.links if link.kind == "norm" and first & set(link.readers)]
    readers = set(norm.readers)
    width = network.model.config.get_text_config().hidden_size
    inside = {n for names in block.experts.values() for n in names}
    assert {
        n for n in inside if weight_of(block.linears[n]).shape[1] == width and n not in trace.weighed_sums
    } <= readers
    assert set(block.gates) <= readers and {n for n in block.linears if "shared" in n and "down" not in n} <= readers
    pairs = {link.producer: link.readers for link in trace.links if link.kind == "linear" and link.producer in inside}
    # gpt-oss adds one to what it gates: scaling that is not undone by scaling what reads it.
    assert len(pairs) == (0 if architecture == "gpt_oss" else len(block.experts))
    assert all(producer.rpartition(".")[0] == reader.rpartition(".")[0] for producer, (reader,) in pairs.items())
    assert len(inside & set(trace.weighed_sums)) == len(block.experts)
    stages = {stage for stage in trace.stages if set(stage) & inside}
    assert len(stages) == 2 * len(block.experts)


@pytest.mark.parametrize("architecture", sorted(set(MIXTURES) - {"jetmoe"}))
def test_transforms_leave_every_mixture_as_it_is_and_reach_its_experts(architecture, ids):
    scheme = SchemeConfig(weight=QuantSpec(bits=8, granularity="channel"))
    model = random_tiny(architecture)
    before = _logits(model, ids)
    result = quantize(model, scheme, {"smooth": {}, "rotate": {}, "rtn": {}}, ids, 2)
    assert {"smooth", "rotate"} <= set(result.proofs)
    assert float((_logits(model, ids) - before).norm() / before.norm()) < 0.1
    names = {layer.name for layer in result.layers}
    assert any("experts" in name for name in names) and not any(name.endswith(("gate", "router")) for name in names)


def test_more_experts_see_a_token_and_the_output_stays():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 6, generator=generator)
    weights, index = scores.topk(2)
    wanted = torch.zeros(5, 6, dtype=torch.bool)
    wanted[1, 0] = wanted[3, 5] = True
    more, added = with_others(index, weights, wanted, scores)
    assert torch.equal(more[:, :2], index) and torch.equal(added[:, :2], weights)
    assert not added[:, 2:].any() and all(len(set(row)) == len(row) for row in more.tolist())
    own = torch.zeros_like(wanted).scatter_(1, index, True)
    seen = torch.zeros_like(wanted).scatter_(1, more, True)
    assert bool((seen >= (wanted | own)).all())
    everywhere, _ = with_others(index, weights, torch.ones_like(wanted), scores)
    assert torch.equal(everywhere.sort(1).values, torch.arange(6).expand(5, 6))


class _Listed(nn.Module):
    """A mixture as older code has it: a list of modules beside a Linear that chooses."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3))


def test_experts_in_a_list_of_modules_have_a_gate_that_stays_in_floating_point():
    block = nn.Module()
    block.moe = _Listed()
    [mixture] = find_mixtures(block, 8)
    assert mixture.gates == ("moe.gate",) and mixture.holders == ("moe.experts",) and not mixture.fused


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "dbrx", "deepseek_v3"])
def test_offloaded_experts_are_read_one_by_one_and_give_the_bits_of_resident_ones(architecture, ids, tmp_path):
    model = random_tiny(architecture).half().float()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    hidden = {}
    for weights in ("resident", "offloaded"):
        loaded = load(ModelConfig(str(tmp_path)), ExecutionConfig(device="cpu", weights=weights))
        network = build_network(loaded.model)
        stream = BlockStream(network, loaded.weights, torch.device("cpu"))
        flow = stream.open(ids, 2)
        stream.run([flow], Nothing())
        hidden[weights] = flow.hidden
        with stream.weights.hold([network.blocks[-1].name]):
            linears = network.blocks[-1].linears.values()
            assert all(not linear.weight.is_meta and linear.weight.is_contiguous() for linear in linears)
        assert weights == "resident" or all(p.is_meta for p in network.blocks[-1].module.parameters())
    assert torch.equal(hidden["offloaded"], hidden["resident"])
