"""ptq allocate: a recipe within its budget, groups kept together, verified beside the best uniform setting, or refused."""

import dataclasses
import json

import pytest
import yaml

from ptq.allocation import allocate_run
from ptq.allocation.allocate_run import run_allocate
from ptq.allocation.allocating import allocated, best_uniform, globs, recipe_text, scheme_of
from ptq.allocation.budget import Budget, budget_from, bytes_from
from ptq.allocation.candidates import candidate
from ptq.allocation.sensitivity import Sensitivity
from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.config.schema import TextConfig
from ptq.config.scheme import linear_specs
from ptq.data.sources import read_text
from ptq.errors import UserError

FORMATS = ("int2_g32", "int3_g32", "int4_g32", "int6_g32")


def make(tmp_path, model, **changes):
    """A recipe of 4-bit weights on a local model, whose windows are of one text, so that they count one by one."""
    text = tmp_path / "text.txt"
    text.write_text(read_text(TextConfig(split="test"), "text").joined[:8000])
    base = {
        "name": "tiny",
        "model": {"path": str(model)},
        "calibration": {"samples": 8, "length": 64},
        "data": {"evaluation": {"source": "file", "path": str(text)}},
        "evaluation": {"windows": 24, "length": 128},
        "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}},
        "steps": {"rtn": {}},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    return recipe_from({**base, **changes})


def found_of(costs):
    """A sensitivity of one-Linear groups of 64 x 64, by the costs of each format."""
    formats = {name: candidate(name) for name in ("int2_g32", "int4_g32", "int8_g32")}
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(len(costs))]
    return Sensitivity(
        formats, dict.fromkeys(names, (64, 64)), tuple((name,) for name in names),
        {name: dict(zip(formats, c, strict=True)) for name, c in zip(names, costs, strict=True)}, 100,
    )  # fmt: skip


def test_bits_go_where_they_buy_most_and_the_budget_holds():
    found = found_of([(1.0, 0.1, 0.0), (0.2, 0.1, 0.0), (9.0, 0.2, 0.0)])
    budget = Budget(bits=6.0).weight_bytes(found, None, None, 2)
    chosen = allocated(found, budget, "--bits: 6")
    assert list(chosen.formats.values()) == ["int4_g32", "int2_g32", "int8_g32"]
    assert chosen.bits <= 6.0 and chosen.cost == pytest.approx(0.3)
    assert best_uniform(found, budget) == "int4_g32" and best_uniform(found, 100) is None


def test_a_budget_that_leaves_no_choice_is_refused_with_the_ends():
    found = found_of([(1.0, 0.1, 0.0)])
    for bits, line in ((2.9, r"below the smallest: int2_g32 everywhere takes 3.0000"), (9.0, "above the largest: int8_g32 everywhere takes 9.0000")):  # fmt: skip
        with pytest.raises(UserError, match=line):
            allocated(found, Budget(bits=bits).weight_bytes(found, None, None, 2), f"--bits: {bits}")


def test_globs_match_the_names_and_no_others():
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (1, 11, 12) for p in "qkvo"]
    asked = [n for n in names if n[-6] != "o"] + ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    import fnmatch

    found = globs(asked)
    assert "model.layers.1.self_attn.[kqv]_proj" in found and len(found) <= 5
    every = [*names, "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert {n for n in every if any(fnmatch.fnmatchcase(n, g) for g in found)} == set(asked)


def test_the_recipe_gives_every_linear_its_format_and_reads_back_as_it_was_written(tmp_path):
    found = found_of([(1.0, 0.1, 0.0), (0.2, 0.1, 0.0), (9.0, 0.2, 0.0)])
    chosen = allocated(found, Budget(bits=6.0).weight_bytes(found, None, None, 2), "--bits: 6")
    other = {
        "modules": "*.up_proj",
        "tensors": {"weight": {"bits": 5}, "input": {"bits": 8, "granularity": "token", "dynamic": True}},
    }
    recipe = make(tmp_path, "nowhere", scheme={"weight": {}, "overrides": [other]})
    made = dataclasses.replace(recipe, scheme=scheme_of(recipe.scheme, chosen, found))
    for name, form in chosen.formats.items():
        specs = linear_specs(made.scheme, name)
        assert specs.weight == found.formats[form] and specs.input.bits == 8
    assert recipe_from(yaml.safe_load(recipe_text(made, ["why"]))) == made


def test_an_allocation_is_run_beside_the_best_uniform_setting_and_kept_where_it_is_better(tmp_path, tiny_llama, capsys):
    recipe = make(tmp_path, tiny_llama)
    path, verdict = run_allocate(recipe, Budget(bits=3.8), FORMATS, True)
    first, second = verdict.pair.first.metrics, verdict.pair.second.metrics
    assert verdict.uniform == "int2_g32" and verdict.better and verdict.pair.paired.high < 0
    assert first["size"]["bits_per_weight"] < second["size"]["bits_per_weight"] <= 3.8 + 1e-9
    increases = [m["quantized_perplexity"] - m["baseline_perplexity"] for m in (first, second)]
    assert verdict.less_increase == pytest.approx(1 - increases[1] / increases[0])
    made = recipe_from(yaml.safe_load(path.read_text()))
    assert made.name == "tiny-3.8bits" and verdict.pair.second.folder.parent.name == made.name
    for block in range(4):
        assert len({linear_specs(made.scheme, f"model.layers.{block}.self_attn.{p}_proj").weight for p in "qkv"}) == 1
        assert (
            len({linear_specs(made.scheme, f"model.layers.{block}.mlp.{p}_proj").weight for p in ("gate", "up")}) == 1
        )
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["verdict"]["better"] and facts["allocation"]["bits"] <= 3.8
    assert "increase" in path.read_text().splitlines()[1] and "recipe: " in capsys.readouterr().out


def test_an_allocation_that_is_no_better_is_refused_and_leaves_no_recipe(tmp_path, tiny_llama, monkeypatch, capsys):
    """The costs are turned round, so that bits go where they buy least."""
    original = allocate_run.measured

    def wrong(*args):
        found = original(*args)
        costs = {n: {f: v / sum(c.values()) ** 2 for f, v in c.items()} for n, c in found.costs.items()}
        return dataclasses.replace(found, costs=costs)

    monkeypatch.setattr(allocate_run, "measured", wrong)
    words = ["int3_g32", "int4_g32", "int2_g32"]
    path, verdict = run_allocate(make(tmp_path, tiny_llama), Budget(bits=4.2), words, True)
    assert not verdict.better and not path.exists()
    assert "refused: not better than uniform int3_g32" in capsys.readouterr().out
    assert not json.loads(path.with_suffix(".json").read_text())["verdict"]["better"]


def test_bytes_of_the_whole_model_and_a_footprint_are_budgets_too(tmp_path, tiny_llama):
    recipe = make(tmp_path, tiny_llama)
    by_bits, _ = run_allocate(recipe, Budget(bits=4.2), FORMATS, True, verify=False, output=tmp_path / "a.yaml")
    facts = json.loads(by_bits.with_suffix(".json").read_text())["allocation"]
    from ptq.footprint.footprint import footprint

    weights = 2 * sum(footprint(recipe).parameters.values())
    count = 8 * facts["bytes"] / facts["bits"]
    whole = int(weights - 2 * count + 4.2 * count / 8)
    cache = footprint(recipe, 64).caches[-1].context
    for budget in (Budget(bytes=whole), Budget(footprint=whole + cache, context=64)):
        path, _ = run_allocate(recipe, budget, FORMATS, True, verify=False, output=tmp_path / "b.yaml")
        assert json.loads(path.with_suffix(".json").read_text())["allocation"]["formats"] == facts["formats"]


def test_formats_that_the_exporter_cannot_express_are_left_out_or_refused(tmp_path, tiny_llama, capsys):
    recipe = make(tmp_path, tiny_llama, export={"format": "gguf"})
    with pytest.raises(UserError, match=r"--formats: int6_g32: scheme.weight.bits: 6"):
        run_allocate(recipe, Budget(bits=4.2), FORMATS, True, verify=False)


@pytest.mark.parametrize(
    ("budget", "formats", "line"),
    [
        (Budget(bits=2.9), FORMATS, "--bits: 2.9: below the smallest: int2_g32 everywhere takes 3.0625 bits a weight"),
        (Budget(bytes=10_000), FORMATS, "--bytes: 10000: below the smallest: int2_g32 everywhere takes 3.0625"),
        (
            Budget(bits=4.0),
            ("int2_g32", "int4_g33"),
            "--formats: int4_g33: scheme.weight.group_size: 33 does not divide",
        ),
    ],
)
def test_what_no_measuring_would_mend_is_refused_before_the_weights_are_read(
    tmp_path, tiny_llama, budget, formats, line, monkeypatch
):
    monkeypatch.setattr(allocate_run, "open_session", lambda *a: pytest.fail("the weights are read"))
    with pytest.raises(UserError) as error:
        run_allocate(make(tmp_path, tiny_llama), budget, formats, True)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((None, None, None, None), "a budget is one of"),
        ((4.0, "80MB", None, None), "--bits beside --bytes"),
        ((-1.0, None, None, None), "no average of bits"),
        ((float("nan"), None, None, None), "no average of bits"),
        ((4.0, None, None, 128), "--context: 128 changes nothing"),
        ((None, "80 megs", None, None), "no size"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(arguments, line):
    with pytest.raises(UserError, match=line):
        budget_from(*arguments)


def test_sizes_are_read_as_they_are_written():
    assert bytes_from("--bytes", "1.5GiB") == 3 * 2**29 and bytes_from("--bytes", "85MB") == 85_000_000
    assert bytes_from("--bytes", "1000") == 1000


def test_the_command_line_says_what_it_cannot_use(capsys):
    where = ["allocate", "--config", "demo"]
    for words, line in (
        (where, "a budget is one of --bits, --bytes and --footprint (none given)"),
        ([*where, "--bits", "4", "--no-verify", "--against", "int4"], "changes nothing beside --no-verify"),
        ([*where, "--bits", "four"], "--bits"),
    ):
        assert main(words) == 2
        assert line in capsys.readouterr().err


def test_embedding_and_head_have_their_share_of_the_budget(tmp_path, tiny_llama):
    spec = {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}
    recipe = make(tmp_path, tiny_llama, scheme={"weight": spec, "embedding": spec, "head": spec})
    path, verdict = run_allocate(recipe, Budget(bits=3.8), FORMATS, True)
    made = recipe_from(yaml.safe_load(path.read_text()))
    assert made.scheme.embedding == made.scheme.head and made.scheme.embedding.bits > 2
    sizes = [run.metrics["size"] for run in (verdict.pair.first, verdict.pair.second)]
    assert verdict.better and sizes[1]["bits_per_weight"] <= 3.8 + 1e-9
    assert sizes[0]["quantized_parameters"] == sizes[1]["quantized_parameters"] > 0.99 * sizes[0]["parameters"]
