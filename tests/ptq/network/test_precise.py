"""Blocks in float32 and float64, whatever their model runs in."""

import copy

import pytest
import torch
from torch import nn

from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.links import trace_links
from ptq.network.network import build_network, weight_of
from ptq.network.norms import gain_offset
from ptq.network.precise import change_error, precise_block, telling_dtype, tolerance_of
from ptq.testing import ARCHITECTURES, random_tiny

HALVES = (torch.float16, torch.bfloat16)


def _opened(model):
    network = build_network(model)
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    return network, stream, stream.open(ids, 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_links_and_sums_of_an_architecture_are_the_same_in_16_bits(architecture, dtype):
    traces = {}
    for kind in (torch.float32, dtype):
        network, stream, _ = _opened(random_tiny(architecture).to(kind))
        traces[kind] = trace_links(network, stream, sums=True)
    assert traces[dtype] == traces[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_norm_that_the_residual_reads_too_is_no_link_in_16_bits_either(dtype):
    model = random_tiny("bloom").to(dtype)
    for block in model.transformer.h:
        block.apply_residual_connection_post_layernorm = True
    network, stream, _ = _opened(model)
    trace = trace_links(network, stream)[0]
    assert [link.kind for link in trace.links] == ["activation"] and len(trace.notes) == 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("architecture", ["gpt_neox", "phi", "bloom", "gpt2"])
def test_gelu_commutes_with_scales_in_no_type(architecture, dtype):
    network, stream, _ = _opened(random_tiny(architecture).to(dtype))
    traces = trace_links(network, stream)
    assert not any(link.homogeneous for trace in traces.values() for link in trace.links)


@pytest.mark.parametrize(
    ("architecture", "wide"),
    [(a, wide) for a in ARCHITECTURES for wide in (torch.float32, torch.float64)],
)
def test_a_precise_block_computes_what_the_block_of_a_wide_copy_of_the_model_computes(architecture, wide):
    model = random_tiny(architecture).to(torch.float16)
    network, stream, flow = _opened(model)
    _, other_stream, other_flow = _opened(copy.deepcopy(model).to(wide))
    block, hidden = network.blocks[0], flow.hidden.clone()
    before = {name: (tensor, tensor.clone()) for name, tensor in block.module.state_dict(keep_vars=True).items()}
    with precise_block(stream, flow, block, wide) as call:
        found = call(hidden)
    expected = other_stream.call(other_flow, other_stream.network.blocks[0], 0, hidden.to(wide))
    assert found.dtype == wide
    # Rotary tables are made in the model's own type: what is left is their rounding.
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    after = block.module.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())


def test_what_is_done_to_the_wide_weights_is_kept_only_where_asked_and_rounded_once():
    network, stream, flow = _opened(random_tiny("llama").to(torch.bfloat16))
    block = network.blocks[0]
    [weight, *_] = [weight_of(module) for module in block.linears.values()]
    original = weight.clone()
    for keep in (False, True):
        with precise_block(stream, flow, block, keep=keep):
            [wide, *_] = [weight_of(module) for module in block.linears.values()]
            for _ in range(64):
                wide.mul_(1.001)
        assert torch.equal(weight, original) is not keep
    expected = original.float()
    for _ in range(64):
        expected.mul_(1.001)
    assert torch.equal(weight, expected.bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in block.module.parameters())


def test_new_modules_and_tensors_come_out_in_the_models_type():
    network, stream, flow = _opened(random_tiny("llama").to(torch.float16))
    block = network.blocks[0]
    norm, linear = block.module.input_layernorm, block.module.mlp.down_proj
    with precise_block(stream, flow, block, keep=True):
        doubled = linear.weight * 2
        linear.weight = nn.Parameter(doubled, requires_grad=False)
        block.module.input_layernorm = nn.Sequential(norm)
        norm.weight.mul_(3)
        block.module.register_buffer("rotation", torch.eye(4))
        block.module.register_buffer("order", torch.arange(4))
    assert torch.equal(linear.weight, doubled.half()) and linear.weight.dtype == torch.float16
    assert norm.weight.dtype == torch.float16 and block.module.rotation.dtype == torch.float16
    assert block.module.order.dtype == torch.int64
    assert torch.isfinite(stream.call(flow, block, 0, flow.hidden)).all()


def test_a_weight_that_no_longer_fits_into_the_models_type_is_named():
    network, stream, flow = _opened(random_tiny("llama").to(torch.float16))
    block = network.blocks[0]
    with (
        pytest.raises(OverflowError, match=r"mlp\.down_proj\.weight no longer fits into torch\.float16"),
        precise_block(stream, flow, block, keep=True),
    ):
        block.module.mlp.down_proj.weight.mul_(1e9)


def test_beside_a_huge_residual_stream_only_float64_tells():
    network, stream, flow = _opened(random_tiny("opt"))
    block, hidden = network.blocks[0], flow.hidden.clone()
    assert telling_dtype(stream, flow, block, hidden) == torch.float32
    hidden[..., 0] += 1e7
    assert telling_dtype(stream, flow, block, hidden) == torch.float64
    with precise_block(stream, flow, block, torch.float64) as call:
        wide = hidden.double()
        before = call(wide)
        block.module.fc2.weight.mul_(1.01)
        assert change_error(wide, before, call(wide)) > 10 * tolerance_of(wide, before)
    assert tolerance_of(wide, before) < 1e-4


def test_a_block_that_has_no_product_in_float64_is_looked_at_in_float32():
    network, stream, flow = _opened(random_tiny("llama"))
    hidden = flow.hidden.clone()
    hidden[..., 0] += 1e7
    assert telling_dtype(stream, flow, network.blocks[0], hidden) == torch.float64

    def narrow(module, args):
        if args[0].dtype == torch.float64:
            raise RuntimeError("no float64 on this device")

    network.blocks[0].module.mlp.register_forward_pre_hook(narrow)
    assert telling_dtype(stream, flow, network.blocks[0], hidden) == torch.float32


def test_links_beside_a_huge_residual_stream_are_those_without():
    model = random_tiny("gpt_neox")
    network, stream, _ = _opened(model)
    expected = trace_links(network, stream)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[:, 0] += 1e8
    found = trace_links(network, stream)
    assert found == expected and not any(link.homogeneous for trace in found.values() for link in trace.links)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_gain_is_told_from_one_plus_gain_in_every_type_and_left_as_it_was(dtype):
    for architecture, offset in (("opt", 0.0), ("llama", 0.0), ("gemma3", 1.0)):
        model = random_tiny(architecture).to(dtype)
        name = "self_attn_layer_norm" if architecture == "opt" else "input_layernorm"
        norm = getattr(build_network(model).blocks[0].module, name)
        before = norm.weight.clone()
        assert gain_offset(norm) == offset
        assert torch.equal(norm.weight, before) and norm.weight.dtype == dtype
