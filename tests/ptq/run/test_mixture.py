"""A trained mixture of experts, from its files to its result."""

import csv
import json

import pytest

from ptq.config.building import recipe_from
from ptq.run.experiment import run


def _result(tiny_mixtral, tmp_path, steps, **calibration):
    recipe = {
        "name": "mixture",
        "model": {"path": str(tiny_mixtral)},
        "calibration": {"samples": 24, "length": 128, "batch_size": 8, **calibration},
        "evaluation": {"windows": 12, "length": 128, "batch_size": 4},
        "scheme": {"weight": {"bits": 3, "granularity": "channel"}},
        "steps": steps,
        "execution": {"device": "cpu"},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    folder = run(recipe_from(recipe))
    with (folder / "layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    return json.loads((folder / "metrics.json").read_text()), layers


@pytest.fixture(scope="module")
def results(tiny_mixtral, tmp_path_factory):
    """RTN, and GPTQ of what the router sends and of all tokens, on one store."""
    place = tmp_path_factory.mktemp("mixture")
    return {
        "rtn": _result(tiny_mixtral, place, {"rtn": {}}),
        "routed": _result(tiny_mixtral, place, {"gptq": {}}),
        "all": _result(tiny_mixtral, place, {"gptq": {}}, experts="all"),
        # The router's order of an expert's tokens is not that of the unquantized network.
        "residual": _result(tiny_mixtral, place, {"gptq": {"target": "residual"}}, experts="all"),
        "original": _result(tiny_mixtral, place, {"gptq": {"target": "original"}}),
    }


def test_three_bits_hurt_a_trained_mixture_and_gptq_mends_it(results):
    excess = {name: metrics["kl_mean"] for name, (metrics, _) in results.items()}
    assert all(excess["rtn"] > 3 * value for name, value in excess.items() if name != "rtn"), excess


def test_the_result_has_the_tokens_of_every_expert(results):
    tokens = 24 * 128
    for name in ("routed", "all"):
        experts = [row for row in results[name][1] if ".experts." in row["name"]]
        assert len(experts) == 3 * 8 * 3
        first = [row for row in experts if row["name"].endswith("gate_proj")]
        assert sum(int(row["routed"]) for row in first) == 3 * 2 * tokens
        assert all(int(row["tokens"]) == (tokens if name == "all" else int(row["routed"])) for row in experts)
    assert not any(row["routed"] for row in results["rtn"][1])
