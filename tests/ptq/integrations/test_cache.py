"""The quantized cache of ``generate`` computes what evaluation has simulated, on every architecture that can be reached."""

import dataclasses

import pytest
import torch
import transformers
from transformers import DynamicCache

from ptq.config.cache import CacheConfig
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.integrations.cache import PackedLayer, cache_size
from ptq.run.in_memory import quantize
from ptq.testing import random_tiny
from quantize.modules.cache import CachedStates, quantize_states
from quantize.spec.quant_spec import QuantSpec

CHANNEL = QuantSpec(bits=3, granularity="channel", symmetric=False, dynamic=True)
TOKEN = QuantSpec(bits=3, granularity="token", symmetric=False, dynamic=True)
GROUP = QuantSpec(bits=4, granularity="group", group_size=4, symmetric=False, dynamic=True, range="mse")
KIVI = SchemeConfig(key=CHANNEL, value=TOKEN, cache=CacheConfig(window=5, first=2, tokens=4))
BARE = SchemeConfig(key=CHANNEL, value=GROUP, cache=CacheConfig(window=3, tokens=4, before_rope=True))
PLAIN = SchemeConfig(key=GROUP, cache=CacheConfig())
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "phi", "mixtral")
TOKENS = 23


def quantized(architecture, scheme, steps=None):
    return quantize(random_tiny(architecture), scheme, steps or {"rtn": {}}, None).model


def tokens(rows=2):
    return torch.randint(3, 64, (rows, TOKENS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def in_parts(model, ids, parts):
    """Logits of `ids`, given to the model part by part with one cache; and the cache."""
    cache, logits = DynamicCache(config=model.config), []
    for part in ids.split(parts, 1):
        logits.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1), cache


@torch.no_grad()
def simulated(model, ids):
    return model(ids, use_cache=False).logits


def assert_alike(found, expected, plain):
    """The two differ by far less than quantizing has moved the logits."""
    assert float((found - expected).norm()) < 0.01 * float((plain - expected).norm())


@pytest.mark.parametrize("architecture", [*ROTARY, "opt", "gpt2"])
def test_token_by_token_with_the_cache_gives_the_logits_of_the_simulated_pass(architecture):
    model, ids = quantized(architecture, KIVI), tokens()
    expected = simulated(model, ids)
    found, cache = in_parts(model, ids, [1] * TOKENS)
    assert_alike(found, expected, simulated(random_tiny(architecture), ids))
    assert all(isinstance(layer, PackedLayer) and layer.get_seq_length() == TOKENS for layer in cache.layers)


@pytest.mark.parametrize("architecture", ROTARY)
def test_keys_held_without_their_rotary_embeddings_too(architecture):
    model, ids = quantized(architecture, BARE), tokens()
    expected = simulated(model, ids)
    other = simulated(quantized(architecture, dataclasses.replace(BARE, cache=CacheConfig(window=3, tokens=4))), ids)
    assert_alike(in_parts(model, ids, [1] * TOKENS)[0], expected, other)
    assert_alike(in_parts(model, ids, [9, 1, 6, 7])[0], expected, other)


@pytest.mark.parametrize("parts", [[TOKENS], [11, 12], [6, 1, 1, 1, 10, 4]])
@pytest.mark.parametrize("scheme", [KIVI, PLAIN])
def test_a_prompt_in_parts_of_any_size_meets_what_each_token_would_meet_alone(scheme, parts):
    model, ids = quantized("llama", scheme), tokens()
    assert_alike(in_parts(model, ids, parts)[0], simulated(model, ids), simulated(random_tiny("llama"), ids))


@pytest.mark.parametrize("scheme", [KIVI, PLAIN])
def test_the_codes_in_the_cache_are_those_of_the_simulation(scheme):
    model, ids = quantized("llama", scheme), tokens()
    _, cache = in_parts(model, ids, [TOKENS])
    attention, seen = model.model.layers[0].self_attn, {}
    attention.attention_quantizers.watch = lambda tensor, x: seen.update({tensor: x.unflatten(2, (-1, 8))})
    simulated(model, ids)
    attention.attention_quantizers.watch = None
    for tensor, states in cache.layers[0].states.items():
        form = attention.attention_quantizers.cache.of(tensor)
        if form is None:
            assert not states.rounded
            continue
        x = seen[tensor].transpose(1, 2)[:, :, form.first : form.settled(TOKENS)]
        fresh = CachedStates(dataclasses.replace(form, first=0, window=0))
        fresh.append(x)
        assert all(torch.equal(states.rounded[name], part) for name, part in fresh.rounded.items())
        assert quantize_states(x, form)["codes"].shape == x.shape


def test_transforms_of_query_and_key_act_before_the_cache():
    steps = {"rotate": {"residual": False, "values": False, "online": ["heads"]}, "rtn": {}}
    model = quantize(random_tiny("llama"), KIVI, steps, tokens()).model
    ids = tokens()
    assert_alike(in_parts(model, ids, [1] * TOKENS)[0], simulated(model, ids), simulated(random_tiny("llama"), ids))


def test_generate_keeps_a_quantized_cache_and_says_what_it_takes():
    model, prompt = quantized("llama", KIVI), tokens()[:, :12]
    made = model.generate(prompt, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    size = cache_size(made.past_key_values)
    forms = model.model.layers[0].self_attn.attention_quantizers.cache
    # Two layers, two samples, two heads of 8 channels.
    assert size.nbytes == 2 * 2 * 2 * (forms.key.nbytes(20, 8, 4) + forms.value.nbytes(20, 8, 4))
    assert (size.tokens, size.tables) == (20, 0) and size.values == 2 * 2 * 2 * 20 * 8 * 2
    follow = simulated(model, made.sequences)[:, 11:-1].argmax(-1)
    assert torch.equal(made.sequences[:, 12:], follow)


def test_beams_and_padded_prompts_keep_their_own_states():
    model, prompt = quantized("llama", BARE), tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    both = model.generate(prompt, **options)
    alone = [model.generate(prompt[i : i + 1], **options) for i in range(2)]
    assert torch.equal(both, torch.cat(alone))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    assert model.generate(prompt, attention_mask=mask, **options).shape == (2, TOKENS + 6)


def test_another_kind_of_cache_is_refused_in_words():
    model, prompt = quantized("llama", KIVI), tokens()
    with pytest.raises(UserError, match="past_key_values: StaticLayer"):
        model.generate(prompt, max_new_tokens=2, cache_implementation="static")
    filled = DynamicCache(config=model.config)
    random_tiny("llama")(prompt, past_key_values=filled, use_cache=True)
    with pytest.raises(UserError, match="start with an empty cache"):
        model(prompt, past_key_values=filled, use_cache=True)
    _, cache = in_parts(model, prompt, [TOKENS])
    with pytest.raises(UserError, match="cannot drop its last tokens"):
        cache.crop(-1)


def test_without_a_cache_in_the_scheme_nothing_is_put_into_the_model():
    model = quantized("llama", dataclasses.replace(KIVI, key=TOKEN, cache=None))
    _, cache = in_parts(model, tokens(), [TOKENS])
    assert not any(isinstance(layer, PackedLayer) for layer in cache.layers)


def test_what_cannot_be_held_without_rotary_embeddings_is_said_before_the_work():
    with pytest.raises(UserError, match="has no rotary embeddings that can be undone: use false"):
        quantized("opt", BARE)
    steps = {"rotate": {"residual": False, "values": False, "online": ["heads"]}, "rtn": {}}
    with pytest.raises(UserError, match=r"before_rope: true, but steps.rotate acts on keys after"):
        quantize(random_tiny("llama"), BARE, steps, tokens())


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_an_attention_that_cannot_be_reached_is_said_before_the_work(architecture):
    with pytest.raises(UserError, match="cannot be reached: use null"):
        quantized(architecture, KIVI)


def test_the_model_type_of_interleaved_embeddings_is_told_by_what_they_do():
    config = transformers.CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(config).eval()
    plain = simulated(model, tokens())
    model = quantize(model, BARE, {"rtn": {}}, None).model
    assert model.model.layers[0].self_attn.attention_quantizers.cache.rotary == "pairs"
    assert_alike(in_parts(model, tokens(), [1] * TOKENS)[0], simulated(model, tokens()), plain)
