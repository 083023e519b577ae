"""GGUF files of mixtures: all experts of a block in one tensor, as the gguf package reads it; others are refused by name."""

import gguf
import numpy as np
import pytest
import torch
import transformers

from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.export.to_gguf import Exporter, Options
from ptq.network.network import build_network
from ptq.testing import MIXTURES, byte_tokenizer, random_tiny
from quantize.spec.quant_spec import QuantSpec

SIZES = {
    "vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
OWN = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 160},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
}  # fmt: skip
Q8, Q4 = QuantSpec(8, granularity="group", group_size=32), QuantSpec(4, granularity="group", group_size=32)


def make(architecture, **changes):
    config = transformers.AutoConfig.for_model(architecture, **{**SIZES, **OWN[architecture], **changes})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model


def export(model, scheme, path, quantized):
    exporter = Exporter(Options())
    exporter.write(quantized(model, exporter.adapt(scheme), byte_tokenizer()), path)
    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: np.array(gguf.dequantize(t.data, t.tensor_type), np.float32).reshape([int(n) for n in t.shape[::-1]])
        for t in reader.tensors
    }
    return (
        tensors,
        {t.name: t.tensor_type.name for t in reader.tensors},
        {k: f.contents() for k, f in reader.fields.items()},
    )


@pytest.mark.parametrize("weight", [Q8, Q4, QuantSpec(4, granularity="group", group_size=32, symmetric=False), None])
@pytest.mark.parametrize("architecture", OWN)
def test_the_experts_of_a_block_are_one_tensor_of_the_simulated_weights(tmp_path, quantized, architecture, weight):
    model = make(architecture)
    scheme = SchemeConfig(weight=weight, exclude=("*self_attn*",) if weight is Q4 else ())
    tensors, types, metadata = export(model, scheme, tmp_path / "m.gguf", quantized)
    name = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA] if architecture == "mixtral" else architecture.replace("_", "")
    count = sum(child.isdigit() for child in model.model.layers[0].mlp.experts._modules)
    chosen = model.config.num_experts_per_tok
    assert metadata["general.architecture"] == name
    assert (metadata[f"{name}.expert_count"], metadata[f"{name}.expert_used_count"]) == (count, chosen)
    for i, layer in enumerate(model.model.layers):
        for part in ("gate", "up", "down"):
            expected = torch.stack([layer.mlp.experts.get_submodule(f"{n}.{part}_proj").weight for n in range(count)])
            assert np.array_equal(tensors[f"blk.{i}.ffn_{part}_exps.weight"], expected.float().numpy()), (i, part)
        assert np.array_equal(tensors[f"blk.{i}.ffn_gate_inp.weight"], layer.mlp.gate.weight.numpy())
        assert types[f"blk.{i}.ffn_gate_inp.weight"] == "F32", "a router's input must not be rounded"
    kinds = {Q8: "Q8_0", Q4: "Q4_0", None: "F16"}
    assert {types[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {kinds.get(weight, "Q4_1")}
    if architecture == "qwen2_moe":
        shared = model.model.layers[1].mlp.shared_expert.up_proj.weight
        assert np.array_equal(tensors["blk.1.ffn_up_shexp.weight"], shared.float().numpy())
        assert metadata["qwen2moe.expert_shared_feed_forward_length"] == 160


@pytest.mark.parametrize("architecture", sorted(set(MIXTURES) - set(OWN)))
def test_other_mixtures_are_refused_by_name(architecture):
    network = build_network(random_tiny(architecture))
    with pytest.raises(UserError, match=f"the model's model_type is '{network.model.config.model_type}'"):
        Exporter(Options()).check(SchemeConfig(weight=Q8), network)


@pytest.mark.parametrize(("architecture", "changes", "field"), [
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
    ("mixtral", {"sliding_window": 16}, "sliding_window 16"),
])  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused_by_field(architecture, changes, field):
    with pytest.raises(UserError, match=f"no place for {field}"):
        Exporter(Options()).check(SchemeConfig(weight=Q8), build_network(make(architecture, **changes)))


def test_experts_of_several_formats_are_refused_for_they_share_a_tensor():
    scheme = SchemeConfig(weight=Q8, overrides=(Override("*.1.mlp.experts.2.*", {"weight": Q4}),))
    with pytest.raises(
        UserError, match=r"experts\.0\.gate_proj and .*experts\.2\.gate_proj have other formats \(Q8_0 and Q4_0\)"
    ):
        Exporter(Options()).check(scheme, build_network(make("mixtral")))
    whole = SchemeConfig(weight=Q8, overrides=(Override("*.1.mlp.experts.*", {"weight": Q4}),))
    assert Exporter(Options()).check(whole, build_network(make("mixtral"))) == ()
