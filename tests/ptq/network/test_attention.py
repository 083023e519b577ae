"""Attentions that call transformers' interface: found by one tiny pass that leaves nothing behind."""

import gc
import weakref

import pytest
import torch

from ptq.config.schema import ModelConfig
from ptq.models.weights import ResidentWeights
from ptq.network.attention import CHILD, attentions_of
from ptq.network.block_stream import BlockStream
from ptq.network.network import build_network
from ptq.network.skeleton import interface_attentions, skeleton
from ptq.testing import random_tiny

CALLERS = {"llama": "self_attn", "opt": "self_attn", "gpt2": "attn", "gpt_neox": "attention", "mixtral": "self_attn"}


def _found(model):
    network = build_network(model)
    return network, attentions_of(network, BlockStream(network, ResidentWeights(), torch.device("cpu")))


@pytest.mark.parametrize("architecture", CALLERS)
def test_the_attentions_of_every_block_are_found_by_name(architecture):
    network, found = _found(random_tiny(architecture))
    assert found == {block.index: [f"{block.name}.{CALLERS[architecture]}"] for block in network.blocks}


@pytest.mark.parametrize("architecture", [*CALLERS, "bloom", "falcon"])
def test_the_same_ones_are_found_without_a_weight(architecture, tmp_path):
    model = random_tiny(architecture)
    model.config.save_pretrained(tmp_path)
    assert interface_attentions(skeleton(ModelConfig(str(tmp_path)), weights=False)) == _found(model)[1]


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_an_attention_of_its_own_is_not_among_them(architecture):
    network, found = _found(random_tiny(architecture))
    assert found == {block.index: [] for block in network.blocks}


def test_looking_for_them_leaves_the_model_as_it_was_and_keeps_nothing_of_it_alive():
    model = random_tiny("llama")
    before = model.config._attn_implementation, set(dict(model.named_modules()))
    _found(model)
    assert before == (model.config._attn_implementation, set(dict(model.named_modules())))
    assert not any(hasattr(module, CHILD) for module in model.modules())
    alive = weakref.ref(model.model.layers[0].self_attn.q_proj)
    del model
    gc.collect()
    assert alive() is None
