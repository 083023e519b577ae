"""rotate: nothing but rounding changes on every architecture it can turn, and 4-bit inputs lose much less."""

import dataclasses
import json

import pytest

from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.run.experiment import run
from ptq.steps._step import STATISTICS
from ptq.steps.transforms.rotate import Options, Step
from ptq.testing import ARCHITECTURES, byte_tokenizer, random_tiny

TOKEN4 = {"bits": 4, "granularity": "token", "dynamic": True}
W4A4 = {"weight": {"bits": 4}, "input": TOKEN4}
# BLOOM's embedding is followed by a norm, Falcon's and Mixtral's norms are read by more than Linears.
TURNED = sorted(set(ARCHITECTURES) - {"bloom", "mixtral"})


def make(tmp_path, model, scheme, steps, **changes):
    base = {
        "name": "turned",
        "model": {"path": str(model)},
        "calibration": {"samples": 4, "length": 32},
        "evaluation": {"windows": 8, "length": 32},
        "scheme": scheme,
        "steps": steps,
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    return recipe_from({**base, **changes})


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def saved(tmp_path, architecture):
    """A random tiny model of the architecture in a folder, with a byte tokenizer."""
    folder = tmp_path / architecture
    model = random_tiny(architecture)
    model.resize_token_embeddings(258)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", TURNED)
@pytest.mark.parametrize("online", [[], ["down", "out"]])
def test_a_turned_network_computes_what_it_did_on_every_architecture(tmp_path, architecture, online):
    m = metrics(run(make(tmp_path, saved(tmp_path, architecture), {}, {"rotate": {"online": online}})))
    assert m["kl_mean"] < 1e-6 and m["top1_agreement"] == 1


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen3"])
def test_query_and_key_turned_after_rotary_embeddings_meet_in_the_same_scores(tmp_path, architecture):
    m = metrics(
        run(
            make(
                tmp_path,
                saved(tmp_path, architecture),
                {},
                {"rotate": {"residual": False, "values": False, "online": ["heads"]}},
            )
        )
    )
    assert m["kl_mean"] < 1e-6 and m["top1_agreement"] == 1


def test_outliers_are_spread_so_that_four_bits_lose_a_fraction_of_what_they_did(tmp_path, tiny_llama_outliers):
    shape = {"calibration": {"samples": 16, "length": 128}, "evaluation": {"windows": 8, "length": 128}}
    plain = metrics(run(make(tmp_path, tiny_llama_outliers, W4A4, {"gptq": {}}, **shape)))
    turned = metrics(run(make(tmp_path, tiny_llama_outliers, W4A4, {"rotate": {}, "gptq": {}}, **shape)))
    across = metrics(
        run(make(tmp_path, tiny_llama_outliers, W4A4, {"rotate": {"online": ["down", "out"]}, "gptq": {}}, **shape))
    )
    assert turned["difference"] < 0.1 * plain["difference"]
    assert across["difference"] < 0.1 * plain["difference"]


def test_four_bit_keys_lose_less_when_they_are_turned(tmp_path, tiny_llama_outliers):
    scheme = {"query": TOKEN4, "key": {**TOKEN4, "bits": 3}}
    plain = metrics(run(make(tmp_path, tiny_llama_outliers, scheme, {"rtn": {}})))
    turned = metrics(run(make(tmp_path, tiny_llama_outliers, scheme, {"rotate": {"online": ["heads"]}, "rtn": {}})))
    assert turned["kl_mean"] < plain["kl_mean"]
    assert any(row["tensor"] == "key" and "int3" in row["format"] for row in turned["tensors"])


def test_a_turned_model_in_half_precision_is_proved_too(tmp_path, tiny_opt):
    recipe = make(tmp_path, tiny_opt, {}, {"rotate": {}})
    m = metrics(run(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="bfloat16"))))
    assert m["kl_mean"] < 0.01


def test_a_network_whose_norms_do_not_show_who_reads_the_stream_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"steps.rotate.residual: .*use residual=false"):
        run(make(tmp_path, saved(tmp_path, "bloom"), {}, {"rotate": {}}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"online": ("dwon",)}, "did you mean 'down'"),
        ({"residual": False, "values": False, "online": ()}, "turns nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Options(**options)


def test_a_step_acts_where_its_options_say():
    assert Step(Options(online=())).acts == {"residual", "weight_input", "weight_output"}
    assert Step(Options(residual=False, values=False, online=("heads",))).acts == {"query", "key"}
    assert STATISTICS not in Step(Options()).captures(None)
