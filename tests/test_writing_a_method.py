"""The examples of docs/writing-a-method.md, run as they stand."""

import json
import pathlib
import re

import pytest

from ptq.config.building import recipe_from
from ptq.run.experiment import run

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "writing-a-method.md"
TOKEN4 = {"bits": 4, "granularity": "token", "dynamic": True}


@pytest.fixture
def ratio(tmp_path, monkeypatch):
    """Runs steps on a model with the page's examples on the path, each under the name that the page gives it."""
    text = PAGE.read_text(encoding="utf-8")
    codes, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL), re.findall(r"[Ss]ave it as `(\w+\.py)`", text)
    assert len(codes) == len(names) == 3
    for name, code in zip(names, codes, strict=True):
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))

    def ratio(model, scheme, steps):
        recipe = {
            "name": "page",
            "model": {"path": str(model)},
            "calibration": {"samples": 8, "length": 128},
            "evaluation": {"windows": 4, "length": 128},
            "scheme": scheme,
            "steps": steps,
            "outputs": str(tmp_path / "outputs"),
            "store": str(tmp_path / "store"),
        }
        return json.loads((run(recipe_from(recipe)) / "metrics.json").read_text())["ratio"]

    return ratio


def test_the_solver_runs_from_its_own_file(ratio, tiny_llama):
    scheme = {"weight": {"bits": 3}}
    mine = {"_target_": "my_method.Step"}
    nearest = ratio(tiny_llama, scheme, {"rtn": {}})
    assert ratio(tiny_llama, scheme, {"mine": {**mine, "ratio": 1.0}}) == nearest > 1
    assert ratio(tiny_llama, scheme, {"mine": {**mine, "ratio": 0.4}}) != nearest


def test_the_transform_spreads_the_outliers_of_what_down_reads(ratio, tiny_llama_outliers):
    scheme = {"overrides": [{"modules": "*.down_proj", "tensors": {"weight": {"bits": 4}, "input": TOKEN4}}]}
    mine = {"turn": {"_target_": "my_transform.Step"}}
    plain, turned = (ratio(tiny_llama_outliers, scheme, steps) for steps in ({"rtn": {}}, {**mine, "rtn": {}}))
    assert 1 < turned < 1 + 0.5 * (plain - 1)


def test_the_learned_method_beats_what_it_starts_from(ratio, tiny_llama):
    scheme = {"weight": {"bits": 2}}
    mine = {"_target_": "my_learned.Step"}
    start, learned = (ratio(tiny_llama, scheme, {"mine": {**mine, "steps": steps}}) for steps in (0, 10))
    assert learned < 1 + 0.8 * (start - 1)
