"""Packed models whose Linears have kernels compute causal windows in parts; other attentions stay as they are."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq.integrations import attention_parts
from ptq.integrations.kernels import use_kernels_
from ptq.integrations.transformers import PtqConfig

LONG = torch.arange(1, 201)[None] % 60


@pytest.fixture
def calls(monkeypatch):
    """The numbers of tokens that attention in parts was called with."""
    seen, own = [], attention_parts.attention_in_parts

    def counted(query, *others):
        seen.append(query.shape[2])
        return own(query, *others)

    monkeypatch.setattr(attention_parts, "attention_in_parts", counted)
    return seen


@torch.no_grad()
def test_logits_of_a_long_prompt_are_those_of_the_usual_attention(tiny_llama, calls):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=PtqConfig(scheme="w8a16"))
    found = model(LONG).logits
    assert calls == [200] * model.config.num_hidden_layers
    model.set_attn_implementation("sdpa")
    assert torch.allclose(found, model(LONG).logits, atol=1e-4 * float(found.std()))
    assert len(calls) == model.config.num_hidden_layers


@torch.no_grad()
def test_padding_and_tokens_after_a_prompt_take_the_usual_attention(tiny_llama, calls):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=PtqConfig(scheme="w8a16"))
    mask = torch.ones_like(LONG)
    mask[:, :5] = 0
    model(LONG, attention_mask=mask)
    assert not calls
    prompt = LONG[:, :190]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] <= 194
    assert calls == [190] * model.config.num_hidden_layers


def test_without_kernels_a_model_has_its_own_attention_again(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=PtqConfig(scheme="w8a16"))
    assert model.config._attn_implementation == attention_parts.NAME
    use_kernels_(model, "simulated")
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_that_a_user_chose_stays(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, attn_implementation="eager", quantization_config=PtqConfig(scheme="w8a16")
    )
    assert model.config._attn_implementation == "eager"


def test_saved_models_do_not_name_it(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=PtqConfig(scheme="w8a16"))
    model.save_pretrained(tmp_path)
    assert attention_parts.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
