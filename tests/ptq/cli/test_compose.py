"""Points that choose the same files share what these give: each is what Hydra composes of its lines."""

import pytest

from ptq.cli import catalog
from ptq.cli.compose import hydra_edge
from ptq.cli.compose.hydra_edge import compose_points

SWEEPS = (
    ["steps.smooth.alpha=0.3,0.5,0.7", "method=smooth"],
    ["scheme=w8a8,w4a4", "scheme.weight.bits=4,8", "method=gptq"],
    ["method=best", "scheme=w4a16,w4a4", "evaluation.windows=2,3"],
    ["evaluation={windows: 2},{length: 64}", "evaluation.windows=5"],
    ["evaluation.windows=5", "evaluation={windows: 2},{length: 64}"],
    ["~export", "+export=gptq,awq"],
    ["~steps.rtn", "steps.gptq.target=original,residual"],
    ["steps.rtn.scales=range,mse", "~steps.rtn"],
    ["export=none,gptq", "model.dtype=float32,bfloat16"],
    ["data.calibration='{source: file, path: a}','{source: docs}'", "name=a,b"],
)


@pytest.mark.parametrize("words", SWEEPS, ids=" ".join)
def test_a_point_is_what_hydra_composes_of_its_lines(words, monkeypatch):
    config = catalog.locate("smollm2-135m_w8a8")
    shared = compose_points(config, words)

    def composed(files, lines):
        return hydra_edge._composed(files.config, lines)

    monkeypatch.setattr(hydra_edge._Files, "composed", composed)
    assert shared == compose_points(config, words)


def test_files_are_put_together_once_for_points_that_differ_in_values(monkeypatch):
    calls = []
    real = hydra_edge.compose
    monkeypatch.setattr(hydra_edge, "compose", lambda **options: calls.append(options["overrides"]) or real(**options))
    words = ["method=smooth,rtn", "evaluation.windows=1,2,3"]
    points = compose_points(catalog.locate("smollm2-135m_w8a8"), words)
    assert len(points) == 6 and len(calls) == 2
    assert [p.recipe.evaluation.windows for p in points] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("word", ["evaluation.windows.more=1,2", "scheme.weight=${nothing},${model}", "steps=3,4"])
def test_a_mistake_in_a_point_is_said_as_hydra_says_it(word, monkeypatch):
    config = catalog.locate("smollm2-135m_w8a8")
    shared = compose_points(config, [word])
    assert all(point.refused for point in shared)
    monkeypatch.setattr(hydra_edge._Files, "composed", lambda files, lines: hydra_edge._composed(files.config, lines))
    assert [p.refused for p in shared] == [p.refused for p in compose_points(config, [word])]


def test_points_do_not_change_one_another():
    words = ["scheme.weight.bits=4,8", "evaluation={windows: 2}"]
    first, second = compose_points(catalog.locate("smollm2-135m_w8a8"), words)
    assert first.recipe.scheme.weight.bits == 4 and second.recipe.scheme.weight.bits == 8
