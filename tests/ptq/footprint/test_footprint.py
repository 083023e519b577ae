"""The footprint of tiny models: against hand counts, transformers' own, loaded tensors and torch's FLOP counter."""

import collections
import json
import time

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from ptq.config.building import recipe_from
from ptq.config.schema import ModelConfig
from ptq.errors import UserError
from ptq.footprint.footprint import (
    BIAS,
    BUFFER,
    EMBEDDING,
    HEAD,
    LINEAR,
    NORM,
    OTHER,
    SCALE,
    cache_bits,
    footprint,
    inventory,
)
from ptq.footprint.passes import attentions_by_structure, trace_shapes
from ptq.network.network import build_network
from ptq.network.skeleton import skeleton
from ptq.run.quantize_visitor import restore
from ptq.testing import ARCHITECTURES, random_tiny
from quantize.modules.simulated import QuantLinear
from quantize.spec.quant_spec import QuantSpec

CONTEXT = 24
WEIGHT8 = {"bits": 8, "granularity": "channel"}


def recipe(folder, **sections):
    return recipe_from({"name": "x", "model": {"path": str(folder)}, **sections})


def config_only(tmp_path, model_type="llama", **options):
    """A folder with config.json and nothing else."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    transformers.AutoConfig.for_model(model_type, **special, **options).save_pretrained(tmp_path)
    return tmp_path


def on_meta(model):
    with torch.device("meta"):
        copy = transformers.AutoModelForCausalLM.from_config(model.config)
        copy.tie_weights()
    return build_network(copy.eval())


LLAMA = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
OPT = {
    "vocab_size": 50, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 16,
}  # fmt: skip


def test_a_llama_is_counted_as_by_hand(tmp_path):
    found = footprint(recipe(config_only(tmp_path, **LLAMA, tie_word_embeddings=False)))
    assert found.parameters == {
        "attention": 3 * (32 * 32 + 2 * 16 * 32 + 32 * 32),
        "mlp": 3 * 3 * 32 * 48,
        "norms": (2 * 3 + 1) * 32,
        "embedding": 50 * 32,
        "head": 50 * 32,
        "other": 0,
    }
    linears = 2 * (found.parameters["attention"] + found.parameters["mlp"])
    # Two products, 4 heads of 8 channels, a multiplication and an addition each, by the tokens looked at.
    assert found.passed.context == 64
    assert found.passed.decode.products == 3 * 2 * 2 * 4 * 8 * 65
    assert found.passed.prefill.products == 64 * 3 * 2 * 2 * 4 * 8 * 64
    assert found.passed.decode.total == linears + 2 * 50 * 32 + found.passed.decode.products


def test_an_opt_with_projections_and_a_tied_head_is_counted_as_by_hand(tmp_path):
    found = footprint(recipe(config_only(tmp_path, "opt", **OPT)))
    assert found.parameters == {
        "attention": 3 * (4 * 32 * 32 + 4 * 32),
        "mlp": 3 * (2 * 32 * 48 + 48 + 32),
        "norms": 3 * 2 * 2 * 32 + 2 * 32,
        "embedding": 50 * 16 + 66 * 32,
        "head": 0,
        "other": 2 * 16 * 32,
    }
    assert found.passed.decode.head == 2 * 50 * 16
    assert found.passed.decode.other == 2 * 2 * 16 * 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_agrees_with_transformers_and_the_flop_counter(architecture):
    model = random_tiny(architecture)
    network = on_meta(model)
    passed = trace_shapes(network, CONTEXT)
    held = inventory(network, passed.attentions)
    assert sum(h.values for h in held if h.kind != BUFFER) == model.num_parameters()
    assert len(passed.attentions) == len(network.blocks)
    model.set_attn_implementation("eager")
    ids = torch.arange(CONTEXT)[None] % 64
    with FlopCounterMode(display=False) as counter:
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert passed.prefill.total == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert passed.decode.total == counter.get_total_flops()
    assert min(passed.prefill.attention, passed.prefill.products, passed.prefill.mlp, passed.prefill.head) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_pass_attention_is_found_by_the_structure(architecture):
    network = on_meta(random_tiny(architecture))
    assert attentions_by_structure(network) == trace_shapes(network, 8).attentions


def test_a_mixture_of_experts_counts_all_in_memory_and_the_chosen_ones_in_flops(tmp_path):
    options = {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}
    found = footprint(recipe(config_only(tmp_path, "mixtral", **options)))
    assert found.parameters["mlp"] == 3 * (8 * 3 * 32 * 48 + 8 * 32)
    assert found.passed.decode.mlp == 2 * 3 * (2 * 3 * 32 * 48 + 8 * 32)
    # The router stays in floating point, and the experts' Linears are what a scheme quantizes.
    assert found.columns[1].by("kind")[OTHER] == 2 * 3 * 8 * 32
    linears = 3 * (8 * 3 * 32 * 48 + 2 * 32 * 32 + 2 * 16 * 32)
    assert [found.columns[i].by("kind")[LINEAR] for i in (1, 2)] == [2 * linears, linears]


def kind_of_loaded(name, module):
    """Tells a loaded tensor's kind by its name: independent of how the footprint does."""
    if "embed" in name:
        return EMBEDDING
    if name.startswith("lm_head"):
        return HEAD
    if "norm" in name:
        return NORM
    return LINEAR if name.endswith("weight") else BIAS


def loaded_bytes(model):
    """Bytes by (kind, dtype) of a loaded model's tensors; a tied tensor once."""
    sums = collections.Counter()
    for name, tensor in model.named_parameters():
        sums[kind_of_loaded(name, model), str(tensor.dtype)] += tensor.nbytes
    for _, tensor in model.named_buffers():
        sums[BUFFER, str(tensor.dtype)] += tensor.nbytes
    return dict(sums)


def predicted_bytes(column):
    names = {"fp32": "torch.float32", "fp16": "torch.float16"}
    sums = collections.Counter()
    for stored in column.stored:
        sums[stored.kind, names[stored.dtype]] += stored.bytes
    return dict(sums)


@pytest.mark.parametrize("kind", ["tiny_opt", "tiny_llama"])
@pytest.mark.parametrize(("title", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_the_bytes_of_a_loaded_models_tensors_are_the_predicted_ones(kind, title, dtype, request):
    folder = request.getfixturevalue(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    [column] = [c for c in footprint(recipe(folder)).columns if c.title == title]
    assert predicted_bytes(column) == loaded_bytes(model)


@pytest.mark.parametrize(
    "spec",
    [
        {"bits": 8, "granularity": "channel"},
        {"bits": 8, "granularity": "tensor", "symmetric": False},
        {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False},
        {"bits": 4, "granularity": "group", "group_size": 32, "scales": "float16"},
    ],
)
def test_the_bytes_of_quantized_linears_are_the_predicted_ones(spec, tiny_opt):
    exclude = ["*.0.*"]
    found = footprint(recipe(tiny_opt, scheme={"weight": spec, "exclude": exclude}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float16)
    network = build_network(model)
    quantized = 0
    for name, module in network.linears.items():
        if ".0." not in name:
            new = QuantLinear(module.weight, None, QuantSpec(**spec))
            restore(model, {name: new})
            quantized += new.stored_bytes()
            if spec["bits"] == 8:  # codes stand unpacked, one a byte: so the tensors themselves can be added up
                zero_points = 0 if new.zero_point is None else new.zero_point.numel()
                assert new.stored_bytes() == new.codes.nbytes + new.scale.nbytes + zero_points
    kinds = found.columns[-1].by("kind")
    left = sum(m.weight.nbytes for n, m in network.linears.items() if ".0." in n)
    assert kinds[LINEAR] + kinds[SCALE] == quantized + left
    assert found.columns[-1].total == sum(kinds.values())


def test_an_override_and_null_change_one_kind_of_linear_only(tmp_path):
    folder = config_only(tmp_path, **LLAMA)
    scheme = {"weight": WEIGHT8, "overrides": [{"modules": "*.mlp.*", "tensors": {"weight": None}}]}
    dtypes = footprint(recipe(folder, scheme=scheme)).columns[-1].by("dtype")
    parameters = footprint(recipe(folder)).parameters
    assert dtypes["int8"] == parameters["attention"]
    rows = 3 * (32 + 16 + 16 + 32)
    assert dtypes["fp32"] == 4 * rows + footprint(recipe(folder)).columns[1].by("dtype")["fp32"]


def test_the_cache_is_counted_by_hand_with_grouped_queries(tmp_path):
    key = {"bits": 8, "granularity": "token", "dynamic": True}
    value = {"bits": 4, "granularity": "group", "group_size": 4, "symmetric": False, "dynamic": True}
    found = footprint(recipe(config_only(tmp_path, **LLAMA), scheme={"key": key, "value": value}), context=10)
    plain, scheme = found.caches
    assert plain.token == 3 * 2 * (2 * 8) * 2  # layers, keys and values, 2 heads of 8 channels, fp16
    keys = 2 * 8 + 2 * 4  # a scale for each head
    values = (2 * 8 * 4 + 4 * 32 + 4 * 4) // 8  # 4 groups, each with scale and zero point
    assert scheme.token == 3 * (keys + values)
    assert (plain.context, scheme.context) == (10 * plain.token, 10 * scheme.token)


def test_a_cache_of_its_own_is_counted_with_what_stays_exact(tmp_path):
    key = {"bits": 4, "granularity": "channel", "symmetric": False, "dynamic": True}
    value = {"bits": 2, "granularity": "group", "group_size": 4, "symmetric": False, "dynamic": True}
    scheme = {"key": key, "value": value, "cache": {"window": 3, "first": 1, "tokens": 8}}
    found = footprint(recipe(config_only(tmp_path, **LLAMA), scheme=scheme), context=31).caches[1]
    keys, values = (
        4 + 4,
        2 + 2 * 4,
    )  # codes, and fp16 scales and least values: 1 channel in 8 tokens, 2 groups of a token
    assert found.token == 3 * 2 * (keys + values)
    # 27 tokens have left the window of 3 after the first one: 24 in full groups of keys.
    assert found.context == 3 * 2 * (24 * keys + 7 * 16 + 27 * values + 4 * 16)


def test_a_static_range_costs_a_token_nothing():
    static = QuantSpec(granularity="tensor", symmetric=False)
    assert cache_bits(2, 8, static, torch.float16) == 8 * 16
    per_call = QuantSpec(granularity="tensor", dynamic=True)
    assert cache_bits(2, 8, per_call, torch.float16) == 8 * 16 + 32


def test_a_window_bounds_the_cache(tmp_path):
    folder = config_only(tmp_path, "mistral", **LLAMA, sliding_window=6)
    short, long = (footprint(recipe(folder), context=n).caches[0] for n in (20, 40))
    assert short.context == long.context < 6 * long.token + 1


def test_peaks_are_ordered_and_quantizing_while_loading_is_the_least(tmp_path):
    found = footprint(recipe(config_only(tmp_path, **LLAMA), scheme={"weight": WEIGHT8}))
    whole, then, during = found.peaks
    assert whole.bytes == found.columns[1].total + 2 * 50 * 32
    assert whole.bytes <= then.bytes
    assert found.columns[-1].total < during.bytes < then.bytes


def test_a_model_that_needs_values_is_still_counted_in_bytes(tmp_path, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def needs_values(self, input_ids, **kwargs):
        return forward(self, input_ids, **kwargs) if bool(input_ids.sum() > 0) else None

    folder = config_only(tmp_path, **LLAMA)
    whole = footprint(recipe(folder))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", needs_values)
    found = footprint(recipe(folder, scheme={"weight": WEIGHT8}))
    assert found.passed is None
    assert "meta" in found.untraced
    assert (found.parameters, found.caches) == (whole.parameters, ())
    assert found.columns[:4] == whole.columns[:4]


@pytest.mark.parametrize(
    ("sections", "context", "said"),
    [
        ({"scheme": {"weight": {"granularity": "group", "group_size": 5}}}, None, "5 does not divide the 32 channels"),
        ({"scheme": {"weight": {"granularity": "cluster"}}}, None, "scheme.weight.granularity: 'cluster'"),
        ({"scheme": {"exclude": ["nothing*"]}}, None, "matches no Linear"),
        ({}, 65, "--context: 65: expected 1 to 64"),
        ({}, 0, "--context: 0"),
    ],
)
def test_what_does_not_fit_is_refused(sections, context, said, tmp_path):
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        footprint(recipe(config_only(tmp_path, **LLAMA), **sections), context)
    assert said in str(caught.value)


def test_a_scheme_for_keys_needs_an_attention_that_can_be_reached(tmp_path):
    folder = config_only(tmp_path, "bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UserError, match="scheme.key: .* use null"):
        footprint(recipe(folder, scheme={"key": {"granularity": "token", "dynamic": True}}))


def test_keys_in_a_latent_cache_have_no_known_size(tmp_path):
    options = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 12,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    folder = config_only(tmp_path, "deepseek_v3", **options)
    assert footprint(recipe(folder)).caches[0].token == 2 * (12 + 4) * 2
    with pytest.raises(UserError, match="scheme.key: .*self_attn caches 12 channels"):
        footprint(recipe(folder, scheme={"key": {"granularity": "token", "dynamic": True}}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        ("{", "is no JSON"),
        ("[1]", "holds no JSON object"),
        ("{}", "model.path"),
        (json.dumps({"model_type": "bert"}), "no causal language model"),
        (json.dumps({"model_type": "llama", **LLAMA, "hidden_size": 31}), "model.path"),
        (json.dumps({"model_type": "llama", **LLAMA, "num_attention_heads": 0}), "model.path"),
        (json.dumps({"model_type": "llama", **LLAMA, "num_hidden_layers": 0}), "model.path"),
        (json.dumps({"model_type": "llama", **LLAMA, "vocab_size": -5}), "model.path"),
    ],
)
def test_a_folder_without_a_usable_config_is_refused_in_one_line(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        footprint(recipe(tmp_path))
    assert said in str(caught.value)


def test_a_mixture_of_671_billion_parameters_is_counted_from_its_config_in_seconds(tmp_path):
    transformers.AutoConfig.for_model("deepseek_v3").save_pretrained(tmp_path)
    before = time.process_time()
    network = skeleton(ModelConfig(path=str(tmp_path)), None, weights=False)
    assert network.parameters == 671_026_404_352
    assert len(network.linears) == 58 * 3 * (256 + 1) + 3 * 3 + 61 * 5
    assert len(network.pieces) == 58 * 3 * 256 and network.coverage() is None
    assert time.process_time() - before < 10
