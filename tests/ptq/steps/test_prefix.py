"""Prefix tokens: what a model computes with them is what it computes after reading them, whatever other steps have done."""

import pytest
import torch
from transformers import DynamicCache

from ptq.config.cache import CacheConfig
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.network.attention import PREFIX, use_simulated_attention
from ptq.network.network import build_network
from ptq.run.in_memory import quantize
from ptq.run.kept.block_file import rebuild, write_block
from ptq.testing import random_tiny
from quantize.spec.quant_spec import QuantSpec

PLAIN = SchemeConfig()
TOKEN8 = SchemeConfig(
    key=QuantSpec(bits=8, granularity="token", symmetric=False, dynamic=True), cache=CacheConfig(window=2)
)
TOKENS = [7, 31]


def ids(rows=3, length=20):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(4))


def after_reading(model, tokens, x):
    with torch.no_grad():
        return model(torch.cat([torch.tensor([tokens]).expand(len(x), -1), x], 1)).logits[:, len(tokens) :]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "phi", "mixtral"])
def test_a_model_with_a_prefix_computes_what_the_model_does_after_reading_it(architecture):
    expected = after_reading(random_tiny(architecture), TOKENS, ids())
    with torch.no_grad():
        plain = random_tiny(architecture)(ids()).logits
        found = quantize(random_tiny(architecture), PLAIN, {"prefix": {"tokens": TOKENS}}, ids()).model(ids()).logits
    assert error(found, expected) < 0.01 * error(plain, expected)


@pytest.mark.parametrize(
    "steps",
    [
        {"smooth": {}, "prefix": {"tokens": TOKENS}},
        {"prefix": {"tokens": TOKENS}, "smooth": {}},
        {"rotate": {"online": ["down", "heads"]}, "prefix": {"tokens": TOKENS}},
        {"prefix": {"tokens": TOKENS}, "rotate": {"online": ["out"]}},
    ],
)
def test_transforms_before_it_and_after_it_leave_that_as_it_is(steps):
    expected = after_reading(random_tiny("llama"), TOKENS, ids())
    with torch.no_grad():
        found = quantize(random_tiny("llama"), PLAIN, steps, ids()).model(ids()).logits
    assert error(found, expected) < 1e-4


def test_a_cache_holds_no_prefix_and_every_token_meets_it():
    model = quantize(random_tiny("llama"), TOKEN8, {"prefix": {"tokens": TOKENS}, "rtn": {}}, ids()).model
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids(), use_cache=False).logits
        for part in ids().split([6, 1, 1, 12], 1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 20
    assert error(torch.cat(parts, 1), whole) < 1e-5
    assert error(whole, after_reading(random_tiny("llama"), TOKENS, ids())) < 0.01


def outlying(tokens):
    """A tiny model that gives some tokens states many times as large as all others."""
    model = random_tiny("llama")
    model.get_input_embeddings().weight[tokens] *= 100
    return model


def test_the_tokens_that_stand_out_most_often_are_found_with_bos_last():
    x = ids(8, 20)
    x[x == 40] = 41
    x[x == 50] = 51
    x[:, 5], x[:, 9], x[:4, 13] = 40, 40, 50
    done = quantize(outlying([40, 50]), PLAIN, {"prefix": {"samples": 8}}, x)
    assert any(note.startswith("prefix: tokens [40, 50, 1]; a sample has 2.50") for note in done.notes)
    done = quantize(outlying([40, 50]), PLAIN, {"prefix": {"samples": 8, "most": 1}}, x)
    assert any(note.startswith("prefix: tokens [1];") for note in done.notes)


def test_static_ranges_are_taken_with_the_prefix_in_place():
    scheme = SchemeConfig(weight=QuantSpec(bits=8), input=QuantSpec(bits=8, granularity="tensor", symmetric=False))
    models = [
        quantize(random_tiny("llama"), scheme, steps, ids()).model
        for steps in ({"rtn": {}}, {"prefix": {"tokens": TOKENS}, "rtn": {}})
    ]
    scales = [float(model.model.layers[1].self_attn.o_proj.inputs.scale) for model in models]
    assert scales[0] != scales[1]
    with torch.no_grad():
        found = models[1](ids()).logits
    assert error(found, after_reading(random_tiny("llama"), TOKENS, ids())) < 0.05


def test_static_ranges_are_taken_once_more_after_two_steps_that_have_made_them_stale():
    static = SchemeConfig(weight=QuantSpec(bits=8, granularity="channel"), input=QuantSpec(bits=8, symmetric=False))
    steps = {"prefix": {"tokens": TOKENS}, "rotate": {}, "rtn": {}}
    expected = after_reading(random_tiny("llama"), TOKENS, ids())
    found = quantize(random_tiny("llama"), static, steps, ids()).model
    with torch.no_grad():
        assert error(found(ids()).logits, expected) < 0.1


def test_a_block_that_is_built_again_has_its_prefix(tmp_path):
    model = quantize(random_tiny("llama"), TOKEN8, {"prefix": {"tokens": TOKENS}, "rtn": {}}, ids()).model
    again = build_network(random_tiny("llama"))
    for block, other in zip(build_network(model).blocks, again.blocks, strict=True):
        write_block(block, tmp_path / "block", {})
        rebuild(other, tmp_path / "block", again, torch.device("cpu"))
    use_simulated_attention(again)
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids()).logits, model(ids(), use_cache=False).logits)


def test_planning_leaves_nothing_in_the_model_when_it_is_refused():
    model = random_tiny("opt")
    with pytest.raises(UserError, match="steps.prefix, but .*self_attn has no rotary embeddings.*: remove it"):
        quantize(model, PLAIN, {"prefix": {}}, ids())
    assert not any(hasattr(module, PREFIX) for module in model.modules())
    with pytest.raises(UserError, match="steps.prefix: this model's attention does not use"):
        quantize(random_tiny("bloom"), PLAIN, {"prefix": {}}, ids())
    with pytest.raises(UserError, match=r"steps.prefix.tokens: 64 is no token of 64: use 0 to 63"):
        quantize(random_tiny("llama"), PLAIN, {"prefix": {"tokens": [64]}}, ids())
