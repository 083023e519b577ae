"""Recipes in formats other than integers: they compose, run on a tiny trained model, and refuse what makes no sense."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.report.results import describe_spec
from ptq.run.experiment import dry_run, run
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import spec_of

BITS = {
    "nf4": 4.5,
    "q8_0": 8.5,
    "mxfp4": 4.25,
    "nvfp4": 4.5,
    "llm_int8": 8.2,
    "fp8": 8.2,
    "nf4_dq": 4.13,
    "mxfp8": 8.25,
}
RECIPES = {"llm-int8": "llm_int8", **{name: name for name in ("nf4", "q8_0", "mxfp4", "nvfp4", "fp8")}}
OTHERS = ("nf4_dq", "fp4", "mxfp8", "nvfp4_w4a4", "q8_0_gguf")
SMALL = ["data=docs", "calibration.samples=2", "calibration.length=64", "evaluation.windows=4", "evaluation.length=64"]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_llama):
    """Overrides that put a recipe on the tiny model, all with one store."""
    folder = tmp_path_factory.mktemp("formats")
    return [f"model.path={tiny_llama}", f"outputs={folder / 'outputs'}", f"store={folder / 'store'}"]


def made(name, *overrides):
    [job] = compose_jobs(catalog.locate(name), list(overrides))
    return job.recipe


def metrics_of(recipe):
    return json.loads((run(recipe) / "metrics.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_of_a_format_dry_runs_and_runs(name, places, capsys):
    recipe = made(f"smollm2-135m_{name}", *SMALL, *places)
    dry_run(recipe)
    assert "ok" in capsys.readouterr().out
    m = metrics_of(recipe)
    assert 0.98 < m["ratio"] < 1.1
    assert m["size"]["bits_per_weight"] == pytest.approx(BITS[RECIPES[name]], abs=0.06)


@pytest.mark.parametrize("scheme", OTHERS)
def test_every_other_scheme_of_a_format_runs(scheme, places):
    m = metrics_of(made("smollm2-135m_nf4", f"scheme={scheme}", *SMALL, *places))
    assert 0.98 < m["ratio"] < 1.2
    if scheme in BITS:
        assert m["size"]["bits_per_weight"] == pytest.approx(BITS[scheme], abs=0.06)


def test_a_run_with_llm_int8_tells_the_share_of_columns_left_in_floating_point(places, capsys):
    shares = [
        metrics_of(made("smollm2-135m_llm-int8", f"scheme.input.threshold={t}", *SMALL, *places))["outlier_share"]
        for t in (1e-6, 2, 1e6)
    ]
    assert shares[0] == 1 and 0 < shares[1] < 1 and shares[2] == 0
    assert "columns stay in floating point" in capsys.readouterr().out
    assert metrics_of(made("smollm2-135m_nf4", *SMALL, *places))["outlier_share"] is None


def test_saved_codes_are_packed_and_decode_to_the_simulated_weight(places):
    recipe = made("smollm2-135m_nf4", *SMALL, *places, "execution.save=true", "scheme.weight.double_quant=true")
    saved = load_file(run(recipe) / "quantized" / "block-00000.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    stored = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    assert set(stored) == {"codes", "scale", "scale_step", "scale_mean"}
    assert stored["codes"].shape == (128, 160)
    weight = codec_of(recipe.scheme.weight).decode(stored, recipe.scheme.weight, (128, 320))
    assert torch.isfinite(weight).all()
    assert weight.abs().max() > 0


def test_smoothing_searches_with_a_format_other_than_integers(places):
    recipe = made("smollm2-135m_fp8", "method=smooth", "steps.smooth.search=true", *SMALL, *places)
    assert 0.98 < metrics_of(recipe)["ratio"] < 1.1


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weight": {"format": "nf44", "bits": 4}}, r"scheme.weight.format: 'nf44' is not valid: .*nearest: 'nf4'|nf4"),
        ({"weight": {"format": "nf4"}}, "scheme.weight.bits: 8 is not valid: expected 4 with format nf4"),
        (
            {"weight": {"format": "llm_int8", "granularity": "token"}},
            "scheme.weight.format: 'llm_int8' is not valid: expected int with bits 8, granularity channel for a weight",
        ),
        (
            {"input": {"format": "nf4", "bits": 4, "granularity": "group", "group_size": 64, "dynamic": True}},
            "scheme.input.format: 'nf4' is not valid: expected mxfp4 for an activation",
        ),
        (
            {"input": {"format": "fp8_e4m3", "granularity": "token"}},
            "scheme.input.granularity: 'token' is not valid: expected tensor with format fp8_e4m3 and dynamic false",
        ),
        (
            {"key": {"format": "llm_int8", "granularity": "token", "dynamic": True}},
            "scheme.key.format: 'llm_int8' is for what a Linear reads",
        ),
        (
            {"weight": {"format": "fp8_e5m2", "granularity": "token"}},
            "scheme.weight.granularity: 'token': a weight has no tokens",
        ),
    ],
)
def test_an_impossible_combination_is_refused_with_the_nearest_choice(scheme, message):
    with pytest.raises(UserError, match=message):
        recipe_from({"name": "x", "model": {"path": "x"}, "scheme": scheme})


def test_gptq_refuses_a_format_without_levels_before_any_work_and_takes_those_that_have_them(places):
    with pytest.raises(UserError, match=r"^scheme.weight.format: 'q8_0' has no levels .* steps.gptq .*: use int with"):
        dry_run(made("smollm2-135m_q8_0", "method=gptq", *SMALL, *places))
    dry_run(made("smollm2-135m_nf4", "method=gptq", *SMALL, *places))


def test_an_exporter_refuses_a_format_that_it_does_not_hold(places):
    recipe = made("smollm2-135m_nf4", "export=compressed-tensors", *SMALL, *places)
    with pytest.raises(UserError, match="^scheme.weight.format: 'nf4' of .* cannot be exported"):
        dry_run(recipe)


def test_a_result_names_the_format():
    assert describe_spec(spec_of("nf4", double_quant=True), 16) == "nf4 group 64 double-quantized"
    assert describe_spec(spec_of("llm_int8", activation=True), 32) == "llm_int8 token dynamic threshold 6"
    assert describe_spec(spec_of("fp8_e4m3"), 16) == "fp8_e4m3 channel"
