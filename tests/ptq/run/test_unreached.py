"""A Linear that no token reaches: named, rounded to nearest, and in the way of nothing."""

import csv

import pytest
import torch
from torch import nn

import ptq.models.shared
from ptq.run.experiment import run
from tests.tools.tiny_runs import metrics_of, tiny_recipe

TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}
TENSOR = {"bits": 8, "granularity": "tensor", "symmetric": False}
NAME = "model.layers.0.mlp.spare"
CASES = {
    "rtn": ({"weight": {"bits": 8}, "input": TOKEN}, {"rtn": {}}),
    "rtn, static": ({"weight": {"bits": 8}, "input": TENSOR}, {"rtn": {}}),
    "static by mse": ({"weight": {"bits": 8}, "input": {**TENSOR, "range": "mse"}}, {"rtn": {}}),
    "static by ema": ({"weight": {"bits": 8}, "input": {**TENSOR, "range": "ema"}}, {"rtn": {}}),
    "gptq": ({"weight": {"bits": 4}}, {"gptq": {}}),
    "gptq, residual": ({"weight": {"bits": 4}, "input": TENSOR}, {"gptq": {"target": "residual"}}),
    "gptq, at once": ({"weight": {"bits": 4}}, {"gptq": {"sequential": False}}),
    "smooth, cluster": ({"weight": {"bits": 8}, "input": TENSOR}, {"smooth": {}, "cluster": {}, "rtn": {}}),
}


@pytest.fixture(autouse=True)
def spare(monkeypatch):
    """Every model has a Linear that it never calls."""
    load = ptq.models.shared.load

    def with_spare(*args, **kwargs):
        loaded = load(*args, **kwargs)
        linear = nn.Linear(128, 16, bias=False).requires_grad_(False)
        with torch.no_grad():
            linear.weight.copy_(torch.linspace(-1, 1, 16 * 128).view(16, 128))
        loaded.model.model.layers[0].mlp.spare = linear
        return loaded

    monkeypatch.setattr(ptq.models.shared, "load", with_spare)


@pytest.mark.parametrize("case", CASES)
def test_a_linear_that_no_token_reaches_is_named_and_the_run_goes_on(tmp_path, tiny_llama, case):
    scheme, steps = CASES[case]
    recipe = tiny_recipe(tmp_path, tiny_llama, scheme, steps)
    for _ in range(2):  # the second time out of the store
        folder = run(recipe)
        assert metrics_of(folder)["kl_mean"] < 1
        rows = {row["name"]: row for row in csv.DictReader((folder / "layers.csv").open())}
        assert rows[NAME]["output_error"] == "" and float(rows[NAME]["weight_sqnr_db"]) > 10
        if case != "rtn":  # which needs no token
            assert NAME in (folder / "run.log").read_text()
