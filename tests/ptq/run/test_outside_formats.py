"""Embedding and head in formats of their own: simulated, counted, exported, reloaded; tied ones together; refused where they cannot be."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers

import ptq
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.footprint.footprint import footprint
from ptq.run.experiment import check_recipe, run, run_recipe
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec
from tests.tools.tiny_runs import metrics_of, tiny_recipe

INT8 = {"bits": 8, "granularity": "group", "group_size": 32}
INT4 = {"bits": 4, "granularity": "group", "group_size": 32}


def make(tmp_path, model, scheme, **changes):
    """A recipe with that scheme on a local model."""
    changes = {"steps": {"rtn": {}} if scheme.get("weight") else {}, **changes}
    here = {"device": "cpu", **changes.pop("execution", {})}
    return tiny_recipe(tmp_path, model, scheme, changes.pop("steps"), execution=here, **changes)


@pytest.fixture(scope="module")
def untied(tiny_llama, tmp_path_factory):
    """The trained LLaMA with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach() * 1.01)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("execution", [{}, {"weights": "offloaded", "hidden_states": "disk"}])
def test_what_is_evaluated_is_the_model_with_those_two_weights_rounded(tmp_path, untied, execution):
    formats = {"embedding": INT4, "head": {"bits": 3}}
    found = metrics_of(run(make(tmp_path, untied, formats, execution=execution)))
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float16).float().eval()
    ids = _evaluated(tmp_path, untied)
    with torch.no_grad():
        before = model(ids).logits[:, :-1].log_softmax(-1)
        for module, spec in ((model.model.embed_tokens, QuantSpec(**INT4)), (model.lm_head, QuantSpec(bits=3))):
            module.weight.copy_(codec_of(spec).fake_weight(module.weight, spec))
        after = model(ids).logits[:, :-1].log_softmax(-1)
    assert found["kl_mean"] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert found["kl_mean"] > 1e-3
    kinds = {row["tensor"]: row for row in found["tensors"]}
    assert kinds["embedding weight"]["share"] > 0 and kinds["head weight"]["share"] > 0
    assert "everything else (norms, ...)" in kinds


def _evaluated(tmp_path, model):
    """The windows that a run evaluates."""
    from ptq.run.record.journal import Journal
    from ptq.run.session import open_session

    with open_session(make(tmp_path, model, {"embedding": INT4, "head": INT4}), Journal()) as session:
        return session.evaluation_tokens().ids


def test_tied_weights_are_rounded_and_counted_together(tmp_path, tiny_llama):
    recipe = make(tmp_path, tiny_llama, {"weight": INT4, "embedding": INT8, "head": INT8})
    folder = run(recipe)
    size = metrics_of(folder)["size"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows, columns = model.model.embed_tokens.weight.shape
    linears = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    )
    stored = rows * columns * 9 / 8 + linears * 5 / 8
    assert size["quantized_parameters"] == rows * columns + linears
    assert size["bits_per_weight"] == pytest.approx(8 * stored / (rows * columns + linears))
    column = next(c for c in footprint(recipe).columns if c.title == "scheme")
    assert column.by("kind")["embedding"] == rows * columns
    for scheme in (
        {"weight": INT4, "head": INT8},
        {"weight": INT4, "embedding": INT8},
        {"embedding": INT8, "head": INT4},
    ):
        with pytest.raises(UserError, match="ties the two weights: give both the same"):
            check_recipe(make(tmp_path, tiny_llama, scheme))


def test_the_model_that_a_run_gives_has_the_rounded_weights_and_one_tensor_where_they_are_tied(tmp_path, tiny_llama):
    result = run_recipe(make(tmp_path, tiny_llama, {"weight": INT8, "embedding": INT4, "head": INT4}))
    model = result.model
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).float()
    spec = QuantSpec(**INT4)
    weight = original.model.embed_tokens.weight.detach()
    assert torch.equal(model.model.embed_tokens.weight, codec_of(spec).fake_weight(weight, spec))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_holds_both_in_their_blocks_and_a_saved_run_exports_the_same_bytes(tmp_path, tiny_llama_eps, untied, tied):
    model = tiny_llama_eps if tied else untied
    scheme = {"weight": INT4, "embedding": INT8, "head": INT8 if tied else INT4}
    recipe = make(
        tmp_path, model, scheme, export={"format": "gguf", "options": {"pre": "default"}}, execution={"save": True}
    )
    folder = run(recipe)
    path = folder / "export" / "gguf" / "model.gguf"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert ("output.weight" in tensors) != tied
    exact = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).float()
    pairs = [("token_embd.weight", exact.model.embed_tokens.weight, INT8)]
    if not tied:
        assert tensors["output.weight"].tensor_type.name == "Q4_0"
        pairs.append(("output.weight", exact.lm_head.weight, INT4))
    for name, weight, fields in pairs:
        spec = QuantSpec(**fields, scales="float16")
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.array_equal(values, codec_of(spec).fake_weight(weight.detach(), spec).numpy())
    from ptq.cli.app import main

    again = tmp_path / "again.gguf"
    assert main(["export", "--run", str(folder), "--format", "gguf", "--output", str(again), "pre=default"]) == 0
    assert again.read_bytes() == path.read_bytes()


def test_compressed_tensors_holds_a_head_of_its_own_and_transformers_loads_it(tmp_path, untied):
    recipe = make(tmp_path, untied, {"weight": INT4, "head": INT8}, export={"format": "compressed-tensors"})
    result = run_recipe(recipe)
    path = result.folder / "export" / "compressed-tensors"
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, result.model(ids).logits, atol=1e-3)
    assert not any(info.values())
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == [] and "lm_head" in str(config["config_groups"])


@pytest.mark.parametrize(
    ("scheme", "changes", "line"),
    [
        ({"weight": INT4, "embedding": INT8, "head": INT8}, {"export": {"format": "compressed-tensors"}}, "scheme.embedding: quantized, but compressed-tensors"),
        ({"weight": {**INT8, "group_size": 16}, "embedding": INT8, "head": INT8}, {"export": {"format": "llama2c"}}, "scheme.embedding.group_size: 32 of the embedding cannot be exported to llama2c"),
        ({"weight": INT4, "embedding": INT4, "head": INT4}, {"export": {"format": "gptq"}}, "scheme.embedding: quantized, but gptq has no place"),
        ({"weight": INT4, "embedding": INT4, "head": INT4}, {"export": {"format": "awq"}}, "scheme.embedding: quantized, but awq has no place"),
        ({"weight": INT4, "embedding": {"bits": 5, "symmetric": False}, "head": {"bits": 5, "symmetric": False}}, {"export": {"format": "gguf"}}, "scheme.embedding.bits: 5"),
        ({"embedding": {**INT8, "group_size": 33}, "head": {**INT8, "group_size": 33}}, {}, "scheme.embedding.group_size: 33 does not divide"),
        ({"embedding": {"granularity": "cluster"}}, {}, "scheme.embedding.granularity: 'cluster'"),
        ({"embedding": {"granularity": "token", "dynamic": True}}, {}, "scheme.embedding.dynamic"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_work(tmp_path, tiny_llama_eps, scheme, changes, line):
    with pytest.raises(UserError) as error:
        check_recipe(make(tmp_path, tiny_llama_eps, scheme, **changes))
    assert line in str(error.value)


def test_a_model_in_memory_has_them_too(tiny_llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    spec, before = QuantSpec(bits=4), model.model.embed_tokens.weight.detach().clone()
    ptq.quantize(model, SchemeConfig(weight=QuantSpec(), embedding=spec, head=spec))
    assert torch.equal(model.model.embed_tokens.weight, codec_of(spec).fake_weight(before, spec))
