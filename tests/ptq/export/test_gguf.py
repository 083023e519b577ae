"""GGUF files: the reader and dequantizer of the gguf package give the simulated weights exactly; what llama.cpp needs is there."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
import transformers

from ptq.config.building import recipe_from
from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.export.to_gguf import Exporter, Options
from ptq.inspect.inspection import inspect
from ptq.network.network import build_network
from ptq.run.experiment import run
from ptq.run.exports import export_run
from ptq.testing import byte_tokenizer, random_tiny
from quantize.spec.quant_spec import QuantSpec, spec_of

GROUPS = QuantSpec(granularity="group", group_size=32)
SCHEMES = {
    "Q8_0": SchemeConfig(weight=GROUPS),
    "Q4_0": SchemeConfig(weight=dataclasses.replace(GROUPS, bits=4)),
    "Q4_1": SchemeConfig(weight=dataclasses.replace(GROUPS, bits=4, symmetric=False)),
    "Q4_0 per channel": SchemeConfig(weight=QuantSpec(4)),
    "Q4_0 of 3 bits": SchemeConfig(weight=dataclasses.replace(GROUPS, bits=3, range="mse")),
    "Q4_1 in groups of 64": SchemeConfig(
        weight=QuantSpec(4, granularity="group", group_size=64, symmetric=False), exclude=("*down_proj",)
    ),
    "mixed": SchemeConfig(
        weight=GROUPS,
        overrides=(Override("*.down_proj", {"weight": QuantSpec(4, granularity="tensor")}), Override("*.0.*v_proj", {"weight": None})),
    ),
}  # fmt: skip
SHORT = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def make(architecture, **changes):
    """A small random model whose weights are fp16 numbers, as a run's baseline makes them."""
    options = {
        "vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257,
        "pad_token_id": None,
    }  # fmt: skip
    if architecture == "gemma3_text":
        options |= {"head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(architecture, **{**options, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(3)
            p.copy_(p.half().float())
    return model


def export(model, scheme, path, quantized, adapt=True):
    exporter = Exporter(Options())
    scheme = exporter.adapt(scheme) if adapt else scheme
    return exporter.write(quantized(model, scheme, byte_tokenizer()), path)


def read(path):
    """Every tensor of a file as the gguf package dequantizes it, and its types and metadata."""
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


def permuted(array, heads):
    """Rows as llama.cpp wants LLaMA's q and k: pairs (i, i + half) of a head become neighbours. Written as a loop."""
    size = len(array) // heads
    return array[[h * size + p + half for h in range(heads) for p in range(size // 2) for half in (0, size // 2)]]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_the_gguf_package_reads_the_simulated_weights_exactly(tmp_path, quantized, architecture, name):
    if name == "Q4_1 in groups of 64" and architecture == "gemma3_text":
        model = make(architecture, num_attention_heads=2, num_key_value_heads=1)
    else:
        model = make(architecture)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    exported = export(model, SCHEMES[name], tmp_path / "m.gguf", quantized)
    tensors, types, _ = read(tmp_path / "m.gguf")
    assert exported.notes == () and exported.bytes == (tmp_path / "m.gguf").stat().st_size
    for i, layer in enumerate(model.model.layers):
        for module, short in SHORT.items():
            expected = layer.get_submodule(module).weight.numpy()
            if architecture == "llama" and short in heads:
                expected = permuted(expected, heads[short])
            assert np.array_equal(tensors[f"blk.{i}.{short}.weight"], expected), (i, short)
    kinds = {types[f"blk.1.{short}.weight"] for short in SHORT.values()}
    expected = {"mixed": {"Q8_0", "Q4_0"}, "Q4_1 in groups of 64": {"Q4_1", "F16"}}
    assert kinds == expected.get(name, {name[:4]})
    assert types["token_embd.weight"] == "F16" and types["output_norm.weight"] == "F32"
    assert np.array_equal(tensors["token_embd.weight"], model.model.embed_tokens.weight.numpy())


def test_norms_biases_and_metadata_are_those_that_llama_cpp_reads(tmp_path, quantized):
    model = make("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    export(model, SCHEMES["Q8_0"], tmp_path / "m.gguf", quantized)
    tensors, types, metadata = read(tmp_path / "m.gguf")
    layer = model.model.layers[1]
    assert np.array_equal(tensors["blk.1.attn_k.bias"], layer.self_attn.k_proj.bias.numpy())
    assert np.array_equal(tensors["blk.1.ffn_norm.weight"], layer.post_attention_layernorm.weight.numpy())
    assert types["blk.1.attn_k.bias"] == types["blk.1.ffn_norm.weight"] == "F32"
    assert np.array_equal(tensors["output.weight"], model.lm_head.weight.numpy())
    expected = {
        "general.architecture": "qwen2", "general.file_type": 7, "qwen2.block_count": 2, "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96, "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1e6, "qwen2.context_length": 64, "qwen2.vocab_size": 262,
    }  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_gemmas_norms_are_stored_with_their_one_and_its_window(tmp_path, quantized):
    model = make("gemma3_text")
    export(model, SCHEMES["Q8_0"], tmp_path / "m.gguf", quantized)
    tensors, _, metadata = read(tmp_path / "m.gguf")
    assert np.array_equal(tensors["output_norm.weight"], model.model.norm.weight.numpy() + 1)
    layer = model.model.layers[0]
    assert np.array_equal(tensors["blk.0.attn_q_norm.weight"], layer.self_attn.q_norm.weight.numpy() + 1)
    assert np.array_equal(tensors["blk.0.ffn_norm.weight"], layer.pre_feedforward_layernorm.weight.numpy() + 1)
    assert np.array_equal(
        tensors["blk.0.post_attention_norm.weight"], layer.post_attention_layernorm.weight.numpy() + 1
    )
    assert metadata["gemma3.attention.sliding_window"] == 6 and metadata["gemma3.attention.key_length"] == 32
    assert metadata["gemma3.rope.freq_base"] == 1e6 and "output.weight" not in tensors


def test_the_tokenizer_is_in_the_file_and_pads_have_names(tmp_path, quantized):
    export(make("llama"), SCHEMES["Q8_0"], tmp_path / "m.gguf", quantized)
    _, _, metadata = read(tmp_path / "m.gguf")
    tokenizer = byte_tokenizer()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.ggml.model"] == "gpt2" and len(tokens) == 262 and tokens[261] == "[PAD261]"
    assert [tokens[i] for i in tokenizer("a b", add_special_tokens=False).input_ids] == ["a", "Ġ", "b"]
    assert metadata["tokenizer.ggml.token_type"][256:260] == [3, 3, 5, 5]
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.add_bos_token"]) == (256, False)


def test_a_sentencepiece_like_tokenizer_keeps_scores_and_kinds():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from ptq.export.packing.gguf_metadata import add_tokenizer

    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "\u2581", "a", "b", "\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer, len(pieces), None)
    found = {key: value.value for key, value in writer.kv_data[0].items()}
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and found["tokenizer.ggml.token_type"][-1] == 1
    scores = found["tokenizer.ggml.scores"]
    assert scores[-2] == 0.0 > scores[-1] == -1.0 > scores[1]


def test_transformers_reads_llama_and_qwen2_back_to_the_same_logits(tmp_path, quantized):
    ids = torch.arange(50)[None]
    for architecture in ("llama", "qwen2"):
        model = make(architecture)
        export(model, SCHEMES["Q4_1"], tmp_path / "m.gguf", quantized)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        with torch.no_grad():
            assert (back(ids).logits - model(ids).logits).abs().max() < 1e-5


def test_a_run_exports_its_weights_and_a_finished_one_says_what_rounding_scales_did(tmp_path, tiny_llama):
    base = {
        "name": "g", "model": {"path": str(tiny_llama)}, "evaluation": {"windows": 1, "length": 64},
        "calibration": {"samples": 1, "length": 64}, "steps": {"rtn": {}}, "execution": {"save": True},
        "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}},
        "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
    }  # fmt: skip
    folder = run(recipe_from({**base, "export": {"format": "gguf"}}))
    made = (folder / "export" / "gguf" / "model.gguf").read_bytes()
    from ptq.config.schema import ExportConfig

    again = export_run(folder, ExportConfig("gguf"), tmp_path / "again.gguf", False)
    assert again.path.read_bytes() == made and again.notes == ()
    offloaded = run(recipe_from({**base, "export": {"format": "gguf"}, "execution": {"weights": "offloaded"}}))
    assert (offloaded / "export" / "gguf" / "model.gguf").read_bytes() == made
    plain = run(recipe_from(base))
    note = export_run(plain, ExportConfig("gguf"), None, False).notes[0]
    assert "scales were rounded to fp16" in note


def test_a_model_out_of_a_gguf_file_keeps_that_files_tokenizer(tmp_path, quantized):
    export(make("llama"), SCHEMES["Q8_0"], tmp_path / "a.gguf", quantized)
    source = quantized(make("llama"), Exporter(Options()).adapt(SCHEMES["Q8_0"]))
    source.origin = tmp_path / "a.gguf"
    Exporter(Options()).write(source, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_inspect_describes_it(tmp_path, quantized):
    export(make("llama"), SCHEMES["mixed"], tmp_path / "m.gguf", quantized)
    tensors = {t.name: t for t in inspect(tmp_path / "m.gguf").tensors}
    assert (tensors["blk.0.ffn_down.weight"].type, tensors["blk.0.attn_v.weight"].type) == ("Q4_0", "F16")
    assert tensors["blk.0.ffn_down.weight"].greatest_error > tensors["blk.0.ffn_up.weight"].greatest_error > 0


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (SchemeConfig(weight=GROUPS, input=QuantSpec(granularity="token", dynamic=True)), "scheme.input: quantized"),
        (SchemeConfig(weight=dataclasses.replace(GROUPS, symmetric=False)), "scheme.weight.bits: 8"),
        (SchemeConfig(weight=dataclasses.replace(GROUPS, group_size=16)), "scheme.weight.group_size: 16"),
        (SchemeConfig(weight=QuantSpec(granularity="cluster")), "scheme.weight.granularity: 'cluster'"),
        (SchemeConfig(weight=GROUPS, key=QuantSpec(granularity="token", dynamic=True)), "scheme.key"),
    ],
)
def test_a_scheme_without_a_block_format_is_refused_with_the_nearest_one(scheme, words):
    with pytest.raises(UserError) as error:
        Exporter(Options()).check(scheme, build_network(make("llama")))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "group_size: 32" in str(error.value) or "scheme.key" in str(error.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: random_tiny("opt"), "model_type is 'opt'"),
        (lambda: random_tiny("gemma3"), "layer_types"),
        (lambda: make("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type"),
        (lambda: make("mistral", sliding_window=8), "sliding_window"),
        (lambda: make("llama", intermediate_size=80), "rows of 80 values"),
        (lambda: make("gemma3_text", query_pre_attn_scalar=64), "query_pre_attn_scalar"),
        (lambda: make("llama", hidden_act="gelu"), "hidden_act"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused_by_field(model, words):
    with pytest.raises(UserError, match=words) as error:
        Exporter(Options()).check(SCHEMES["Q8_0"], build_network(model()))
    assert "\n" not in str(error.value)


def test_an_unknown_pre_tokenizer_asks_for_its_name():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from ptq.export.packing.gguf_metadata import add_tokenizer

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(UserError, match="export.options.pre"):
        add_tokenizer(gguf.GGUFWriter(None, "llama"), tokenizer, 3, None)
    add_tokenizer(gguf.GGUFWriter(None, "llama"), tokenizer, 3, "gpt-2")


K_QUANTS = SchemeConfig(
    weight=spec_of("q4_k"),
    overrides=(Override("*.down_proj", {"weight": spec_of("q6_k")}), Override("*.v_proj", {"weight": spec_of("q5_k")}),
               Override("*.o_proj", {"weight": GROUPS})),
)  # fmt: skip


def test_k_quants_of_several_types_lie_side_by_side_and_the_package_reads_them_exactly(tmp_path, quantized):
    model = make("llama", hidden_size=256, intermediate_size=256)
    export(model, K_QUANTS, tmp_path / "m.gguf", quantized)
    tensors, types, fields = read(tmp_path / "m.gguf")
    heads = {"attn_q": 4, "attn_k": 2}
    for i, layer in enumerate(model.model.layers):
        for module, short in SHORT.items():
            weight = layer.get_submodule(module).weight.numpy()
            expected = permuted(weight, heads[short]) if short in heads else weight
            assert np.array_equal(tensors[f"blk.{i}.{short}.weight"], expected), short
    kinds = {short: types[f"blk.0.{short}.weight"] for short in SHORT.values()}
    assert kinds == {
        "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q5_K", "attn_output": "Q8_0", "ffn_gate": "Q4_K", "ffn_up": "Q4_K",
        "ffn_down": "Q6_K",
    }  # fmt: skip
    assert fields["general.file_type"] == 14


def test_rows_that_are_no_whole_superblocks_are_refused_with_what_to_do():
    with pytest.raises(
        UserError, match="rows of 64 values are no whole superblocks of 256: give it another format by an override"
    ):
        Exporter(Options()).check(SchemeConfig(weight=spec_of("q4_k")), build_network(make("llama")))
