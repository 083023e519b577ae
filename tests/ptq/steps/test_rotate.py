"""rotate: nothing but rounding changes on every architecture it can turn, and 4-bit inputs lose much less."""

import dataclasses
import functools
import json
import re

import pytest
import torch
import transformers

from ptq.config.schema import ExportConfig
from ptq.errors import UserError
from ptq.run.experiment import dry_run, run
from ptq.run.exports import export_run
from ptq.steps._registry import build_steps
from ptq.steps._step import STATISTICS
from ptq.steps.transforms.rotate import Options, Step
from ptq.testing import ARCHITECTURES, random_tiny
from tests.tools.tiny_runs import metrics_of, saved, tiny_recipe

TOKEN4 = {"bits": 4, "granularity": "token", "dynamic": True}
W4A4 = {"weight": {"bits": 4}, "input": TOKEN4}

make = functools.partial(tiny_recipe, windows=8, length=32)


def tiny(tmp_path, architecture):
    """A random tiny model of the architecture in a folder, with a byte tokenizer."""
    model = random_tiny(architecture)
    model.resize_token_embeddings(258)
    return saved(model, tmp_path / architecture)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("options", [{"online": []}, {"online": ["down", "out"], "block": 8}])
def test_a_turned_network_computes_what_it_did_on_every_architecture(tmp_path, architecture, options):
    m = metrics_of(run(make(tmp_path, tiny(tmp_path, architecture), {}, {"rotate": options})))
    assert m["kl_mean"] < 1e-6 and m["top1_agreement"] == 1


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen3"])
def test_query_and_key_turned_after_rotary_embeddings_meet_in_the_same_scores(tmp_path, architecture):
    m = metrics_of(
        run(
            make(
                tmp_path,
                tiny(tmp_path, architecture),
                {},
                {"rotate": {"residual": False, "values": False, "online": ["heads"]}},
            )
        )
    )
    assert m["kl_mean"] < 1e-6 and m["top1_agreement"] == 1


def test_outliers_are_spread_so_that_four_bits_lose_a_fraction_of_what_they_did(tmp_path, tiny_llama_outliers):
    shape = {"calibration": {"samples": 16, "length": 128}, "evaluation": {"windows": 8, "length": 128}}
    plain = metrics_of(run(make(tmp_path, tiny_llama_outliers, W4A4, {"gptq": {}}, **shape)))
    turned = metrics_of(run(make(tmp_path, tiny_llama_outliers, W4A4, {"rotate": {}, "gptq": {}}, **shape)))
    across = metrics_of(
        run(make(tmp_path, tiny_llama_outliers, W4A4, {"rotate": {"online": ["down", "out"]}, "gptq": {}}, **shape))
    )
    assert turned["difference"] < 0.1 * plain["difference"]
    assert across["difference"] < 0.1 * plain["difference"]


def with_outlying_keys(source, folder, factor=30.0):
    """The same model with the first rotary pair of every key `factor` times as great, and of every query as much smaller."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    half = model.config.head_dim // 2
    for layer in model.model.layers:
        for linear, scale in ((layer.self_attn.k_proj, factor), (layer.self_attn.q_proj, 1 / factor)):
            rows = linear.weight.data.view(-1, 2, half, linear.in_features)
            rows[:, :, 0] *= scale
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_keys_of_few_bits_with_an_outlying_channel_lose_less_when_they_are_turned(tmp_path, tiny_llama):
    model = with_outlying_keys(tiny_llama, tmp_path / "outlying")
    scheme = {"query": {**TOKEN4, "bits": 8}, "key": TOKEN4}
    plain = metrics_of(run(make(tmp_path, model, scheme, {"rtn": {}})))
    turned = metrics_of(run(make(tmp_path, model, scheme, {"rotate": {"online": ["heads"]}, "rtn": {}})))
    assert turned["kl_mean"] < 0.5 * plain["kl_mean"]
    assert any(row["tensor"] == "key" and "int4" in row["format"] for row in turned["tensors"])


def test_a_turned_model_in_half_precision_is_proved_too(tmp_path, tiny_opt):
    recipe = make(tmp_path, tiny_opt, {}, {"rotate": {}})
    m = metrics_of(run(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="bfloat16"))))
    assert m["kl_mean"] < 0.01


@pytest.mark.parametrize("execution", [{}, {"weights": "offloaded"}])
def test_a_head_that_is_no_longer_the_embedding_counts_in_the_size_and_is_said(tmp_path, tiny_opt, execution):
    scheme, rotate = {"weight": {"bits": 8}}, {"online": []}
    found = [
        run(make(tmp_path, tiny_opt, scheme, {**steps, "rtn": {}}, execution=execution))
        for steps in ({}, {"rotate": rotate})
    ]
    tied, untied = (metrics_of(folder)["size"] for folder in found)
    config = json.loads((tiny_opt / "config.json").read_text())
    head = 2 * config["vocab_size"] * config["word_embed_proj_dim"]
    assert (tied["untied_bytes"], untied["untied_bytes"]) == (0, head)
    assert untied["after_bytes"] - tied["after_bytes"] == head
    assert untied["before_bytes"] == tied["before_bytes"]
    assert "for a head that is no longer the embedding" in (found[1] / "run.log").read_text()


@pytest.mark.parametrize("weights", ["resident", "offloaded"])
def test_a_network_whose_norms_do_not_show_who_reads_the_stream_is_refused(tmp_path, tiny_llama, monkeypatch, weights):
    monkeypatch.setattr("ptq.steps.transforms.rotate._stream_links", lambda *args: [])
    with pytest.raises(UserError, match=r"steps.rotate.residual: .*model.layers.0 is not found: use residual=false"):
        run(make(tmp_path, tiny_llama, {}, {"rotate": {}}, execution={"weights": weights}))


def test_a_stream_that_begins_with_a_norm_is_turned_online_there_and_no_export_takes_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    model, scheme = tiny(tmp_path, "bloom"), {"weight": {"bits": 8, "granularity": "group", "group_size": 16}}
    steps = {"rotate": {"online": []}, "rtn": {}}
    found = [
        metrics_of(run(make(tmp_path, model, scheme, steps, execution={"weights": weights})))
        for weights in ("resident", "offloaded")
    ]
    assert found[0]["kl_mean"] == found[1]["kl_mean"] < 1e-4
    with pytest.raises(UserError, match="norms write to this model's residual stream"):
        run(make(tmp_path, model, scheme, {"rotate": {"online": [], "seeds": 2}, "rtn": {}}))
    with pytest.raises(UserError, match="export.format: compressed-tensors holds the modules of the model's own"):
        run(make(tmp_path, model, scheme, steps, export={"format": "compressed-tensors"}))
    folder = run(make(tmp_path, model, scheme, steps, execution={"save": True}))
    with pytest.raises(UserError, match="export"):
        export_run(folder, ExportConfig("compressed-tensors"), None, False)


@pytest.mark.parametrize("options", [{"learn": "cayley"}, {"learn": "qr", "loss": "whip", "block": 32}, {"seeds": 3}])
def test_a_rotation_chosen_on_calibration_tokens_is_proved_and_flattens_tokens_that_were_held_out(
    tmp_path, tiny_llama, options
):
    folder = run(make(tmp_path, tiny_llama, W4A4, {"rotate": options, "rtn": {}}))
    log = (folder / "run.log").read_text()
    assert "rotate: proved on every block" in log
    if "seeds" in options:
        assert re.search(r"rotate: seed \d of 3: loss", log)
    else:
        before, after = map(float, re.search(r"held-out tokens ([\d.]+) -> ([\d.]+)", log).groups())
        assert after < 0.99 * before


def test_blocks_of_the_formats_groups_serve_it_and_a_size_that_does_not_divide_is_refused(
    tmp_path, tiny_llama_outliers
):
    block = {"bits": 4, "granularity": "group", "group_size": 32}
    scheme = {"weight": block, "input": {**block, "dynamic": True}}
    plain = metrics_of(run(make(tmp_path, tiny_llama_outliers, scheme, {"gptq": {}})))
    rotate = {"block": 32, "online": ["down", "out"]}
    turned = metrics_of(run(make(tmp_path, tiny_llama_outliers, scheme, {"rotate": rotate, "gptq": {}})))
    assert turned["difference"] < plain["difference"]
    with pytest.raises(UserError, match=r"steps.rotate.block: 48 does not divide the \d+ channels of .*: use \d+"):
        run(make(tmp_path, tiny_llama_outliers, scheme, {"rotate": {"block": 48}, "gptq": {}}))


def test_a_width_without_a_hadamard_matrix_says_what_is_used_and_is_turned_all_the_same(tmp_path):
    folder = run(make(tmp_path, tiny(tmp_path, "llama"), {}, {"rotate": {"block": 16, "online": ["down"]}}))
    assert "3 blocks: width 16 = 2^4: a Hadamard matrix" in (folder / "run.log").read_text()
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=46, intermediate_size=94, num_hidden_layers=2, num_attention_heads=2, head_dim=24
    )
    torch.manual_seed(0)
    odd = saved(transformers.LlamaForCausalLM(config), tmp_path / "odd")
    folder = run(make(tmp_path, odd, {}, {"rotate": {"online": ["down"]}}))
    log = (folder / "run.log").read_text()
    assert metrics_of(folder)["kl_mean"] < 1e-6
    assert (
        "rotate: residual stream: width 46 = 2^1 x 23: no Hadamard matrix is known here; the factor 23 is the orthogonal"
        in log
    )
    assert (
        "rotate: online: width 94 = 2^1 x 47: no Hadamard matrix is known here; the factor 47 is the orthogonal" in log
    )


@pytest.mark.parametrize(
    ("weight", "steps", "warned"),
    [
        ({"bits": 4}, {"rotate": {}, "rtn": {}}, True),
        ({"bits": 4}, {"rotate": {}, "rtn": {"scales": "block"}}, False),
        ({"bits": 4}, {"rotate": {}, "gptq": {}}, False),
        ({"bits": 4}, {"rotate": {"residual": False}, "rtn": {}}, False),
        ({"bits": 4, "granularity": "group", "group_size": 32}, {"rotate": {}, "rtn": {}}, False),
        ({"bits": 8}, {"rotate": {}, "rtn": {}}, False),
        ({"bits": 4}, {"rtn": {}}, False),
    ],
)
def test_rounding_to_nearest_with_one_range_a_row_after_a_rotation_is_warned_of_before_the_work(
    tmp_path, tiny_llama, capsys, weight, steps, warned
):
    dry_run(make(tmp_path, tiny_llama, {"weight": weight}, steps))
    assert ("use steps.gptq in place of steps.rtn" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("form", "options", "warned"),
    [("nvfp4", {}, True), ("nvfp4", {"block": 16}, False), ("nvfp4", {"residual": False}, False), ("mxfp4", {}, False)],
)
def test_a_rotation_of_the_whole_stream_before_nvfp4_inputs_is_warned_of(
    tmp_path, tiny_llama, capsys, form, options, warned
):
    spec = {"format": form, "bits": 4, "granularity": "group", "group_size": 16 if form == "nvfp4" else 32}
    dry_run(
        make(tmp_path, tiny_llama, {"weight": spec, "input": {**spec, "dynamic": True}}, {"rotate": options, "rtn": {}})
    )
    assert ("with NVFP4 inputs it was found to hurt" in capsys.readouterr().out.replace("\n", " ")) == warned


def test_smoothing_by_the_formula_after_a_rotation_is_warned_of(tmp_path, tiny_llama):
    log = (run(make(tmp_path, tiny_llama, W4A4, {"rotate": {}, "smooth": {}, "rtn": {}})) / "run.log").read_text()
    assert "smooth: its formula goes by" in log
    assert (
        "smooth: model.layers.0.mlp.up_proj left alone: a step before acts online on what model.layers.0.mlp.down"
        in log
    )
    with pytest.raises(UserError, match="steps.rotate: a transform after the solver gptq"):
        build_steps({"gptq": {}, "rotate": {}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"online": ("dwon",)}, "did you mean 'down'"),
        ({"loss": "whip"}, "steps.rotate.loss: 'whip' changes nothing"),
        ({"residual": False, "values": False, "online": ()}, "turns nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Options(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learn": "caley"}, "did you mean 'cayley'"),
        (
            {"learn": "qr", "residual": False},
            "steps.rotate.learn: qr changes nothing beside steps.rotate.residual=false",
        ),
        ({"seeds": 0}, "steps.rotate.seeds: 0 is too small"),
        ({"learn": "qr", "rate": 2.0}, "steps.rotate.rate: 2.0 is too great"),
        ({"steps": 5}, "steps.rotate.steps: 5 changes nothing beside steps.rotate.learn=null"),
    ],
)
def test_a_value_without_effect_or_out_of_bounds_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        build_steps({"rotate": options})


def test_a_step_acts_where_its_options_say():
    assert Step(Options(online=())).acts == {"residual", "weight_input", "weight_output"}
    assert Step(Options(residual=False, values=False, online=("heads",))).acts == {"query", "key"}
    assert STATISTICS not in Step(Options()).captures(None)
