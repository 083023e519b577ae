"""A block that is changed for a while is itself again: modules, children, parameters written into or replaced, hooks."""

import pytest
import torch
from torch import nn

from ptq.network.network import build_network, replace_module
from ptq.network.outside import set_weight
from ptq.network.replaced import hooked, put_back
from ptq.testing import random_tiny


def written(block, network):
    block.linears[f"{block.name}.self_attn.q_proj"].weight.zero_()


def replaced(block, network):
    set_weight(block.module.input_layernorm, "weight", torch.ones(32))


def another(block, network):
    replace_module(network.model, f"{block.name}.mlp.up_proj", nn.Linear(32, 48, bias=False))


def child(block, network):
    block.module.self_attn.add_module("own", nn.Identity())


def buffer(block, network):
    block.module.self_attn.register_buffer("own", torch.ones(1))


def hook(block, network):
    block.module.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


@pytest.mark.parametrize("change", [written, replaced, another, child, buffer, hook])
@torch.no_grad()
def test_whatever_is_changed_is_put_back(change):
    network = build_network(random_tiny("llama"))
    block, ids = network.blocks[0], torch.arange(3, 20)[None]
    before, state = network.model(ids).logits, dict(block.module.named_parameters())
    with put_back(network, block):
        change(block, network)
        inside = network.model(ids).logits
    assert torch.equal(inside, before) == (change in {child, buffer})
    assert torch.equal(network.model(ids).logits, before)
    now = dict(block.module.named_parameters())
    assert now.keys() == state.keys() and all(now[name] is state[name] for name in state)
    assert not hasattr(block.module.self_attn, "own")


def test_hooks_are_taken_off_whatever_happens_inside_and_while_they_are_put_on():
    linears, seen = [nn.Linear(2, 2), nn.Linear(2, 2)], []
    put_on = (each.register_forward_hook(lambda *_: seen.append(1)) for each in linears)
    with pytest.raises(KeyError), hooked(put_on):
        linears[1](torch.ones(2))
        raise KeyError
    assert seen == [1]
    with pytest.raises(AttributeError), hooked(each.register_forward_hook(print) for each in [linears[0], None]):
        pass
    assert not any(each._forward_hooks for each in linears)
