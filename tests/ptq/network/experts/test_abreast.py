"""The experts of a mixture are solved for in two passes of the samples, not in two for each; the bits are those of one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.experts import abreast as module
from ptq.network.experts.abreast import abreast, most_bytes
from ptq.network.links import trace_links
from ptq.network.network import build_network
from ptq.ranks.sample_sum import SampleSum, leaf_of, sums_held
from ptq.run.experiment import run
from ptq.testing import random_tiny


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_stages_of_experts_go_together_and_the_others_alone_in_their_order(architecture):
    network = build_network(random_tiny(architecture))
    traces = trace_links(network, BlockStream(network, ResidentWeights(), torch.device("cpu")), False)
    for block in network.blocks:
        stages, experts = traces[block.index].stages, block.experts
        inside = {name: expert for expert, names in experts.items() for name in names}
        found = abreast(block, stages, 3)
        assert sorted(stage for together in found for stage in together) == sorted(stages)
        alone = [together[0] for together in found if together[0][0] not in inside]
        assert all(len(together) == 1 for together in found if together[0][0] not in inside)
        assert alone == [stage for stage in stages if stage[0] not in inside]
        grouped = [together for together in found if together[0][0] in inside]
        assert len(grouped) == (2 if experts else 0)
        for together in grouped:
            assert [inside[stage[0]] for stage in together] == list(experts)
        for expert in experts:
            mine = [stage for together in grouped for stage in together if inside[stage[0]] == expert]
            assert mine == [stage for stage in stages if inside.get(stage[0]) == expert]


def test_moments_of_one_pass_stay_within_bounds(monkeypatch):
    network = build_network(random_tiny("qwen3_moe"))
    block = network.blocks[0]
    stages = [(f"{expert}.gate_proj", f"{expert}.up_proj") for expert in block.experts]
    width = block.linears[stages[0][0]].weight.shape[1]
    monkeypatch.setattr(module, "most_bytes", lambda _: 3 * 4 * 5 * width**2)
    assert [len(together) for together in abreast(block, stages, 5)][:1] == [3]
    monkeypatch.setattr(module, "most_bytes", lambda _: 1)
    assert abreast(block, stages, 5) == [[stage] for stage in stages]


def test_moments_of_one_pass_may_take_half_a_block_and_a_quarter_gibibyte_at_least():
    assert most_bytes(10**9) == 4 * 10**9 // 2
    assert most_bytes(1) == 2**28


@given(st.integers(1, 300))
def test_sums_that_are_held_are_as_many_as_a_tree_of_samples_holds_at_its_fullest(samples):
    alive = most = 0

    def empty():
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return None

    def merge(_, other):
        nonlocal alive
        alive -= 1

    total = SampleSum(leaf_of(samples), empty, merge)
    for sample in range(samples):
        total.of(sample)
    assert most <= sums_held(samples)
    assert samples < 2 or most >= sums_held(samples) - 1


def test_experts_that_are_solved_for_together_get_the_bits_of_one_by_one(tmp_path, tiny_mixtral, monkeypatch):
    def saved(name, **execution):
        recipe = recipe_from(
            {
                "name": name,
                "model": {"path": str(tiny_mixtral)},
                "calibration": {"samples": 4, "length": 32, "batch_size": 2},
                "evaluation": {"windows": 2, "length": 32},
                "scheme": {"weight": {"bits": 3}},
                "steps": {"gptq": {}},
                "execution": {"save": True, **execution},
                "outputs": str(tmp_path / "outputs"),
                "store": str(tmp_path / "store"),
            }
        )
        calls = []
        with monkeypatch.context() as patch:
            call = BlockStream.call
            patch.setattr(BlockStream, "call", lambda self, *a: calls.append(a[1].index) or call(self, *a))
            folder = run(recipe)
        files = sorted((folder / "quantized").glob("block-*.safetensors"))
        return {f"{p.name} {k}": t for p in files for k, t in load_file(p).items()}, len(calls)

    resident, offloaded = saved("resident"), saved("offloaded", weights="offloaded")
    assert resident[0].keys() == offloaded[0].keys()
    assert all(torch.equal(t, offloaded[0][key]) for key, t in resident[0].items())
    monkeypatch.setattr(module, "most_bytes", lambda _: 1)
    one_by_one = saved("one", weights="offloaded")
    assert all(torch.equal(t, one_by_one[0][key]) for key, t in resident[0].items())
    assert offloaded[1] < one_by_one[1]
