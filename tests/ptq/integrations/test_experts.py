"""Mixtures loaded packed: their fused experts are Linears, read one by one under the names that checkpoints have."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptq.integrations.replace import quantize_
from ptq.integrations.transformers import PtqConfig
from ptq.network.network import build_network
from ptq.testing import random_tiny
from quantize.modules.packed import PackedLinear

PUBLISHED_APART = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "phimoe")
IDS = (torch.arange(18) * 5 % 60)[None] + 1


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def packed(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("architecture", PUBLISHED_APART)
def test_a_mixture_is_packed_while_it_is_loaded_and_saved_under_its_published_names(tmp_path, architecture):
    model = random_tiny(architecture)
    model.save_pretrained(tmp_path / "plain")
    reference = copy.deepcopy(model)
    network = build_network(reference)
    gates = {gate for block in network.blocks for gate in block.gates}
    quantize_(reference, "w4a16", filter_fn=lambda module, name: name not in gates)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=PtqConfig("w4a16"), dtype=torch.float32
    )
    experts = {name for block in network.blocks for names in block.experts.values() for name in names}
    assert experts and experts <= packed(loaded) == packed(reference)
    assert not any(p.dim() == 3 for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), logits(reference), rtol=1e-5, atol=1e-5)

    loaded.save_pretrained(tmp_path / "packed")
    before = {name.removesuffix(".weight") for name in load_file(tmp_path / "plain" / "model.safetensors")}
    after = {name.rpartition(".")[0] for name in load_file(tmp_path / "packed" / "model.safetensors")}
    assert all(any(a == b or b.startswith(f"{a}.") or a.startswith(b) for b in before) for a in after)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert packed(again) == packed(loaded) and again.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    # A floating-point product's last bit may depend on where in a file its weight lies.
    torch.testing.assert_close(logits(again), logits(loaded), rtol=1e-6, atol=1e-6)


def test_a_run_over_tokens_holds_no_fused_weight_and_generates(tmp_path, tiny_mixtral):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_mixtral, quantization_config=PtqConfig("nf4", group_size=32), dtype=torch.float32
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_mixtral, dtype=torch.float32)
    a, b = logits(loaded), logits(plain)
    assert 0 < float((a - b).norm() / b.norm()) < 0.3
    tokens = loaded.generate(IDS, max_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, IDS.shape[1] + 6)
    held = sum(p.nbytes for p in loaded.parameters()) + sum(t.nbytes for t in loaded.buffers())
    assert held < 0.35 * sum(p.nbytes for p in plain.parameters())


@pytest.mark.parametrize("architecture", ["gpt_oss", "granitemoe"])
def test_experts_that_are_published_in_one_tensor_stay_as_they_are(tmp_path, architecture):
    model = random_tiny(architecture)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=PtqConfig("w8a16"), dtype=torch.float32
    )
    assert packed(loaded) and any(p.dim() == 3 for p in loaded.parameters())
    a, b = logits(loaded), logits(model)
    assert 0 < float((a - b).norm() / b.norm()) < 0.1


def test_config_json_says_which_linears_are_packed_experts_included(tmp_path):
    random_tiny("mixtral").save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=PtqConfig("w4a16", skip_modules=["lm_head", "experts.0"]),
        dtype=torch.float32,
    )
    assert not any(".experts.0." in name for name in packed(loaded)) and any(
        ".experts.1." in name for name in packed(loaded)
    )
    loaded.save_pretrained(tmp_path / "packed")
    found = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert found["skip_modules"] == ["lm_head", "experts.0"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert packed(again) == packed(loaded) and torch.equal(logits(again), logits(loaded))
