"""Every architecture's blocks, links and roles, by name; and the stream's logits against the model's own."""

import pytest
import torch

from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.links import Link, describe, load_traces, save_traces, trace_links
from ptq.network.network import build_network
from ptq.testing import random_tiny

GATES_AND_UPS = [(e, p) for e in range(4) for p in ("gate", "up")]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = {
    ("norm", "input_layernorm", QKV),
    ("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("linear", "self_attn.v_proj", ("self_attn.o_proj",)),
    ("linear", "mlp.up_proj", ("mlp.down_proj",)),
}
EXPECTED = {
    "opt": (
        "model.decoder.layers",
        {
            ("norm", "self_attn_layer_norm", QKV),
            ("norm", "final_layer_norm", ("fc1",)),
            ("activation", "activation_fn", ("fc2",)),
            ("linear", "self_attn.v_proj", ("self_attn.out_proj",)),
        },
    ),
    "llama": ("model.layers", GATED),
    "mistral": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "qwen3": ("model.layers", GATED),
    "gemma3": (
        "model.layers",
        (GATED - {("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))})
        | {("norm", "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"))},
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            ("norm", "input_layernorm", ("attention.query_key_value",)),
            ("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ("activation", "mlp.act", ("mlp.dense_4h_to_h",)),
        },
    ),
    "phi": (
        "model.layers",
        {
            ("norm", "input_layernorm", (*QKV, "mlp.fc1")),
            ("activation", "mlp.activation_fn", ("mlp.fc2",)),
            ("linear", "self_attn.v_proj", ("self_attn.dense",)),
        },
    ),
    "bloom": (
        "transformer.h",
        {
            ("norm", "input_layernorm", ("self_attention.query_key_value",)),
            ("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ("activation", "mlp.gelu_impl", ("mlp.dense_4h_to_h",)),
        },
    ),
    "falcon": (
        "transformer.h",
        {
            ("norm", "input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
            ("activation", "mlp.act", ("mlp.dense_4h_to_h",)),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            ("norm", "ln_1", ("attn.c_attn",)),
            ("norm", "ln_2", ("mlp.c_fc",)),
            ("activation", "mlp.act", ("mlp.c_proj",)),
        },
    ),
    "mixtral": (
        "model.layers",
        {
            ("norm", "input_layernorm", QKV),
            ("linear", "self_attn.v_proj", ("self_attn.o_proj",)),
            (
                "norm",
                "post_attention_layernorm",
                ("mlp.gate", *(f"mlp.experts.{e}.{p}_proj" for e, p in GATES_AND_UPS)),
            ),
            *(("linear", f"mlp.experts.{e}.up_proj", (f"mlp.experts.{e}.down_proj",)) for e in range(4)),
        },
    ),
}


def _stream(model):
    network = build_network(model)
    return network, BlockStream(network, ResidentWeights(), torch.device("cpu"))


def _short(link: Link, prefix: str):
    cut = len(f"{prefix}.{link.block}.")
    return link.kind, link.producer[cut:], tuple(reader[cut:] for reader in link.readers)


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_links_of_every_architecture_are_found_by_name(architecture):
    network, stream = _stream(random_tiny(architecture))
    prefix, expected = EXPECTED[architecture]
    traces = trace_links(network, stream)
    assert [block.name for block in network.blocks] == [f"{prefix}.{i}" for i in range(len(network.blocks))]
    for block in network.blocks:
        assert {_short(link, prefix) for link in traces[block.index].links} == expected


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_stream_gives_the_logits_of_the_model_itself(architecture):
    model = random_tiny(architecture)
    _, stream = _stream(model)
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    flow = stream.open(ids, batch_size=2)
    stream.run([flow], Nothing())
    with stream.head() as head:
        chunks = [head(flow.hidden[:, i : i + 5]) for i in range(0, 12, 5)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=1e-4, atol=1e-5)


PRE_NORM = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}
SUMS = {
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": ""},
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    # Gemma 3 norms an output before it adds it: nothing is added to what that norm reads.
    "gemma3": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"},
    "gpt_neox": {"attention.dense": "", "mlp.dense_4h_to_h": ""},
    "phi": {"self_attn.dense": "", "mlp.fc2": ""},
    "bloom": {"self_attention.dense": "post_attention_layernorm", "mlp.dense_4h_to_h": ""},
    "falcon": {"self_attention.dense": "", "mlp.dense_4h_to_h": ""},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": ""},
    "mixtral": {"self_attn.o_proj": "post_attention_layernorm"},
}


RESTS = {
    **{
        name: {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
        for name in ("llama", "mistral", "qwen2", "qwen3")
    },
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
    "bloom": {"self_attention.dense": "", "mlp.dense_4h_to_h": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
    "mixtral": {"self_attn.o_proj": ""},
}
"""Of the others an attention and an MLP are added at once, or nothing is added."""


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_what_is_read_of_a_file_of_links_is_all_that_was_found(architecture, tmp_path):
    network, stream = _stream(random_tiny(architecture))
    traces = trace_links(network, stream, sums=True)
    save_traces(traces, tmp_path / "links")
    assert load_traces(tmp_path / "links") == traces


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_sums_that_outputs_are_part_of_and_what_reads_their_rests_are_found_by_name(architecture):
    network, stream = _stream(random_tiny(architecture))
    for block, trace in zip(network.blocks, trace_links(network, stream, sums=True).values(), strict=True):
        prefix = f"{block.name}."
        assert {k.removeprefix(prefix): v.removeprefix(prefix) for k, v in trace.sums.items()} == SUMS[architecture]
        rests = {k.removeprefix(prefix): v.removeprefix(block.name)[1:] for k, v in trace.rests.items()}
        assert rests == RESTS.get(architecture, {})


def test_query_key_and_value_are_told_apart():
    network, stream = _stream(random_tiny("llama"))
    roles = trace_links(network, stream)[0].roles
    assert {name.rsplit(".", 1)[1]: role for name, role in roles.items()} == {
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
    }


def test_a_value_head_shared_by_several_query_heads_repeats_its_scale():
    network, stream = _stream(random_tiny("llama"))
    link = next(x for x in trace_links(network, stream)[0].links if x.producer.endswith("v_proj"))
    assert link.repeat > 1
    scale = torch.arange(link.head_dim * 2, dtype=torch.float32)
    heads = link.reader_scale(scale).view(2, link.repeat, link.head_dim)
    assert torch.equal(heads[:, 0], scale.view(2, -1)) and torch.equal(heads[:, 0], heads[:, 1])


def test_experts_that_are_no_linears_are_named_with_their_share():
    # JetMoe's attention hands its experts' products around in a way that no code outside of the block can call.
    network, _ = _stream(random_tiny("jetmoe"))
    sentence = network.coverage()
    share = sum(u.parameters for u in network.uncovered) / sum(p.numel() for p in network.model.parameters())
    assert (
        sentence is not None and "self_attention.experts.input_linear.weight" in sentence and f"{share:.1%}" in sentence
    )


class _Copies(torch.nn.Module):
    """Gives its Linear other numbers than any module returned: nothing to find."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x + 1.0)


def test_an_architecture_without_links_says_what_it_cannot_do():
    model = random_tiny("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn, block.mlp.c_fc = _Copies(block.attn.c_attn), _Copies(block.mlp.c_fc)
        block.mlp.c_proj = _Copies(block.mlp.c_proj)
    network, stream = _stream(model)
    lines = describe(trace_links(network, stream))
    assert any("cannot be used" in line for line in lines)
    assert len(network.linears) == 2 * 4


def test_a_norm_that_the_residual_reads_too_is_no_link():
    model = random_tiny("bloom")
    for block in model.transformer.h:
        block.apply_residual_connection_post_layernorm = True
    network, stream = _stream(model)
    trace = trace_links(network, stream)[0]
    assert [link.kind for link in trace.links] == ["activation"]
    assert sum("not a link" in note for note in trace.notes) == 2
