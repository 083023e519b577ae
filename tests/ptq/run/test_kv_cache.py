"""Runs with a cache: what the result says, the model that generates with it, long windows, a block that is built again."""

import pathlib

import pytest
import torch

from ptq.errors import UserError
from ptq.integrations.cache import PackedLayer, cache_size
from ptq.network import attention
from ptq.network.network import build_network
from ptq.run.experiment import dry_run, run_recipe
from ptq.run.in_memory import quantize
from ptq.run.kept.block_file import rebuild, write_block
from ptq.testing import random_tiny
from tests.tools.tiny_runs import tiny_recipe

KEY = {"bits": 2, "granularity": "channel", "symmetric": False, "dynamic": True}
VALUE = {"bits": 2, "granularity": "group", "group_size": 16, "symmetric": False, "dynamic": True, "range": "mse"}
CACHE = {"window": 16, "first": 4, "tokens": 8}


def recipe(tmp_path, model, length=96, **scheme):
    return tiny_recipe(tmp_path, model, scheme, {"rtn": {}}, evaluation={"windows": 4, "length": length})


def metrics(tmp_path, model, **scheme):
    return run_recipe(recipe(tmp_path, model, **scheme)).metrics


def test_a_run_says_how_the_cache_holds_what_and_its_model_generates_with_it(tmp_path, tiny_llama):
    result = run_recipe(recipe(tmp_path, tiny_llama, key=KEY, value=VALUE, cache=CACHE))
    said = {row["tensor"]: row for row in result.metrics["tensors"]}
    assert said["key"]["format"] == "int2 in a cache, 8 tokens a range, 16 recent and 4 first tokens in 16 bits"
    assert said["value"]["format"].startswith("int2 in a cache, 16 channels a range of least squared error")
    assert said["key"]["modules"] == said["value"]["modules"] == 4
    made = result.model.generate(
        torch.arange(64)[None], max_new_tokens=2, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )
    assert all(isinstance(layer, PackedLayer) for layer in made.past_key_values.layers)
    assert cache_size(made.past_key_values).bits_per_value < 16


def test_a_longer_window_loses_less_and_so_do_more_bits(tmp_path, tiny_llama):
    found = {
        name: metrics(tmp_path, tiny_llama, key={**KEY, "bits": bits}, value={**VALUE, "bits": bits}, cache=cache)
        for name, bits, cache in [
            ("2", 2, {"tokens": 8}),
            ("2, window", 2, {**CACHE, "window": 48}),
            ("4", 4, {"tokens": 8}),
        ]
    }
    kl = {name: figures["kl_mean"] for name, figures in found.items()}
    assert kl["2"] > 2 * kl["2, window"] > 0 and kl["2"] > 5 * kl["4"] > 0


def test_queries_pass_in_parts_with_the_same_result(monkeypatch):
    ids = torch.randint(3, 64, (2, 41), generator=torch.Generator().manual_seed(0))
    scheme = recipe(
        pathlib.Path("/nowhere"), "x", key={**KEY, "bits": 3}, value={**VALUE, "group_size": 4}, cache=CACHE
    ).scheme
    for architecture in ("llama", "mistral", "gemma3"):
        model = quantize(random_tiny(architecture), scheme, {"rtn": {}}, None).model
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            monkeypatch.setattr(attention, "SCORES", 2 * 4 * 41 * 7)
            parts = model(ids, use_cache=False).logits
            monkeypatch.undo()
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before_rope", [False, True])
def test_a_block_that_is_built_again_has_its_cache(tmp_path, before_rope):
    scheme = recipe(
        pathlib.Path("/nowhere"),
        "x",
        key=KEY,
        value={**VALUE, "group_size": 8},
        cache={**CACHE, "before_rope": before_rope},
    )
    model = quantize(random_tiny("llama"), scheme.scheme, {"rtn": {}}, None).model
    network, again = build_network(model), build_network(random_tiny("llama"))
    for block, other in zip(network.blocks, again.blocks, strict=True):
        write_block(block, tmp_path / "block", {})
        rebuild(other, tmp_path / "block", again, torch.device("cpu"))
    attention.use_simulated_attention(again)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_an_attention_that_cannot_be_reached_is_said_without_a_weight_read(tmp_path, architecture):
    random_tiny(architecture).config.save_pretrained(tmp_path / "model")
    random_tiny(architecture).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="scheme.key: this model's attention .* cannot be reached: use null"):
        dry_run(recipe(tmp_path, tmp_path / "model", length=64, key=KEY, cache=CACHE))
