"""Every shipped recipe and every choice of a group composes into a checked recipe."""

import dataclasses
import re

import pytest
import yaml

from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.errors import UserError
from ptq.run.experiment import checked
from ptq.steps._registry import build_steps

SHIPPED = {
    "demo", "smollm2-135m_w8a8", "smollm2-135m_w4a16", "smollm2-135m_w4a4",
    "opt-1.3b_w8a8", "opt-1.3b_w4a4", "llama-2-7b_w8a8", "chatglm-like", "moss-like",
}  # fmt: skip
CHOICES = [(group, choice) for group, choices in catalog.groups().items() for choice in choices]


def compose(name, *overrides):
    [job] = compose_jobs(catalog.locate(name), list(overrides))
    return job.recipe


def bits(spec):
    return None if spec is None else spec.bits


def test_the_promised_recipes_are_shipped():
    assert set(catalog.recipes()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(catalog.recipes()))
def test_a_shipped_recipe_composes_and_its_name_says_what_it_is(name):
    recipe = compose(name)
    assert recipe.name == name
    assert recipe.steps
    if found := re.fullmatch(r"([a-z0-9]+).*_w(\d+)a(\d+)(_static|_all)?", name):
        model, weight, inputs, _ = found.groups()
        assert bits(recipe.scheme.weight) == int(weight)
        assert (bits(recipe.scheme.input) or 16) == int(inputs)
        assert model in recipe.model.path.lower()


@pytest.mark.parametrize("name", sorted(catalog.recipes()))
def test_the_steps_of_a_shipped_recipe_are_those_of_the_method_it_names_so_that_another_can_be_named(name):
    assert "steps" not in yaml.safe_load(catalog.locate(name).read_text())
    for method in ("hqq", "rotate_clip_gptq"):
        recipe = compose(name, f"method={method}")
        assert recipe.steps.keys() == compose("demo", f"method={method}").steps.keys()
        assert list(build_steps(recipe.steps)) == list(recipe.steps)


@pytest.mark.parametrize("words", [
    "smollm2-135m_quarot_w4a4", "smollm2-135m_wush_w4a4", "smollm2-135m_flatquant_w4a4", "smollm2-135m_spinquant_w4a4",
    "llama-2-7b_w4a4kv4 steps.rotate.online=[down]", "smollm2-135m_kv4", "smollm2-135m_kv4 scheme=kv2 method=best",
    *(f"smollm2-135m_w4a16 method={m}" for m in ("awq_gptq", "awq", "hqq", "autoround", "omniquant", "lowrank_gptq", "best")),
    "smollm2-135m_w3a16 method=best", "smollm2-135m_w4a16 method=lowrank_gptq export=compressed-tensors scheme.weight.symmetric=true",
])  # fmt: skip
def test_a_recipe_with_another_method_fits_together(words):
    name, *overrides = words.split()
    recipe, steps = checked(compose(name, *overrides))
    assert list(steps) == list(recipe.steps)


def test_the_two_rptq_recipes_differ_only_in_norm_outputs_and_probabilities():
    published, everything = compose("opt-1.3b_rptq_w4a4"), compose("opt-1.3b_rptq_w4a4_all")
    assert dataclasses.replace(everything, name="", scheme=published.scheme) == dataclasses.replace(published, name="")
    for tensor in ("weight", "input", "query", "key", "value"):
        assert getattr(published.scheme, tensor) == getattr(everything.scheme, tensor)
        assert getattr(published.scheme, tensor).bits == 4
    assert (published.scheme.attention_probs.bits, everything.scheme.attention_probs.bits) == (8, 4)
    assert all(set(o.tensors) == {"input"} and o.tensors["input"].bits == 8 for o in published.scheme.overrides)
    assert everything.scheme.overrides == ()


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_fits_the_demo(group, choice):
    recipe = compose("demo", f"{group}={choice}")
    assert recipe.name == "demo"


def test_the_schemes_are_what_their_names_say():
    tensor, static = compose("demo", "scheme=w8a8_tensor").scheme, compose("demo", "scheme=w8a8_static").scheme
    assert tensor.weight.granularity == tensor.input.granularity == "tensor"
    assert tensor.input.dynamic
    assert not static.input.dynamic
    assert not static.input.symmetric
    grouped = compose("demo", "scheme=w4a16_g64").scheme
    assert (grouped.weight.group_size, grouped.weight.symmetric, grouped.input) == (64, False, None)
    token = compose("demo", "scheme=w4a4").scheme.input
    assert (token.bits, token.granularity, token.dynamic) == (4, "token", True)


def test_the_smol_wt2_protocol_has_its_sizes_and_its_files(monkeypatch):
    monkeypatch.setenv("PTQ_DATA", "/somewhere")
    recipe = compose("smollm2-135m_w8a8", "data=smol-wt2")
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.bos) == (64, 512, False)
    assert (recipe.evaluation.windows, recipe.evaluation.length, recipe.evaluation.bos) == (16, 1024, False)
    assert recipe.data.calibration.path == "/somewhere/wikitext2-valid-tokenized.txt"
    assert recipe.data.evaluation.path == "/somewhere/wikitext2-test-head.txt"


def test_every_config_says_what_it_is():
    files = sorted(catalog.config_folder().rglob("*.yaml"))
    assert files
    assert [str(path) for path in files if not catalog.describe(path)] == []


BEST = sorted(path.stem for path in (catalog.config_folder() / "method" / "best").glob("*.yaml"))


@pytest.mark.parametrize("scheme", BEST)
def test_the_best_method_goes_by_the_scheme_and_says_what_it_measured(scheme):
    recipe = compose("demo", "method=best", f"scheme={scheme}")
    assert recipe == compose("demo", f"scheme={scheme}", f"method=best/{scheme}")
    assert list(recipe.steps)[-1] in {"rtn", "gptq", "tune"}
    said = catalog.describe(catalog.config_folder() / "method" / "best" / f"{scheme}.yaml")
    assert re.search(r"\d\.\d{2,4} x|KL 0\.\d{4}", said)


def test_every_scheme_has_a_best_method():
    assert sorted(path.stem for path in (catalog.config_folder() / "scheme").glob("*.yaml")) == BEST


def test_the_best_method_of_a_recipes_own_defaults_follows_a_scheme_of_the_command_line(tmp_path):
    text = (catalog.config_folder() / "demo.yaml").read_text().replace("method: rtn", "method: best")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    [job] = compose_jobs(path, ["scheme=w4a16_g64"])
    assert job.recipe.steps["gptq"]["target"] == "residual"
    (tmp_path / "scheme").mkdir()
    (tmp_path / "scheme" / "mine.yaml").write_text("# Five bits.\nweight: {bits: 5}\n")
    with pytest.raises(
        UserError, match="method=best: no recipe was measured for scheme=mine .*w4a16_g64.*: name a method"
    ):
        compose_jobs(path, ["scheme=mine"])
