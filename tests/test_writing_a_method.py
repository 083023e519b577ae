"""The example of docs/writing-a-method.md, run as it stands."""

import json
import pathlib
import re

from ptq.config.schema import recipe_from
from ptq.run.experiment import run

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "writing-a-method.md"


def test_the_method_of_the_documentation_runs_from_its_own_file(tmp_path, tiny_llama, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    (tmp_path / "my_method.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    ratios = {}
    for name, steps in {
        "nearest": {"rtn": {}},
        "whole": {"mine": {"_target_": "my_method.Step", "ratio": 1.0}},
        "narrow": {"mine": {"_target_": "my_method.Step", "ratio": 0.4}},
    }.items():
        recipe = recipe_from(
            {
                "name": name,
                "model": {"path": str(tiny_llama)},
                "calibration": {"length": 128},
                "evaluation": {"windows": 4, "length": 128},
                "scheme": {"weight": {"bits": 3}},
                "steps": steps,
                "outputs": str(tmp_path / "outputs"),
                "store": str(tmp_path / "store"),
            }
        )
        ratios[name] = json.loads((run(recipe) / "metrics.json").read_text())["ratio"]
    assert ratios["whole"] == ratios["nearest"] > 1
    assert ratios["narrow"] != ratios["nearest"]
