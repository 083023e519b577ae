"""Points that differ in what comes behind the blocks quantize these once, and give what they would give alone."""

import dataclasses
import pathlib
import shutil

import pytest
import torch
import transformers
import yaml

from ptq.config.building import recipe_from
from ptq.run.experiment import blocks_of, run_recipe
from ptq.sweep.lending import FOLDER, in_turn
from ptq.sweep.points import Point, read_sweep
from tests.tools.same_bits import results, same

BORROWED = "another run's finished blocks"


@pytest.fixture
def calibrated(sweeps):
    """Sweeps of a recipe with smoothing and GPTQ."""
    content = yaml.safe_load(sweeps.recipe.read_text())
    content |= {"steps": {"smooth": {"alpha": 0.5}, "gptq": {}}}
    content["calibration"] |= {"samples": 4, "length": 64}
    sweeps.recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return sweeps


def change(sweeps, **parts):
    content = yaml.safe_load(sweeps.recipe.read_text()) | parts
    sweeps.recipe.write_text(yaml.safe_dump(content, sort_keys=False))


def untied(folder, model):
    """A copy of a model whose head is a weight of its own."""
    made = transformers.AutoModelForCausalLM.from_pretrained(model)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    shutil.copytree(model, folder)
    made.save_pretrained(folder)
    return folder


def logs_of(sweeps):
    return [path.read_text() for path in sorted((sweeps.folders[-1] / "points").glob("*.log"))]


CASES = {
    "tuner": ["+steps.tune={steps: 1},{steps: 2}"],
    "saved": ["execution.save=true,false"],
    "interval": [
        "evaluation.confidence=0.9,0.8",
        "execution.weights=offloaded",
        "~steps.gptq",
        "+steps.rotate={seeds: 2}",
        "+steps.gptq={}",
    ],
    "head": ["+scheme.head={bits: 8},{bits: 4}"],
}


@pytest.mark.parametrize("case", CASES)
def test_what_comes_behind_the_blocks_is_swept_over_blocks_that_are_quantized_once(
    calibrated, tmp_path, tiny_llama, case
):
    if case == "head":
        change(calibrated, model={"path": str(untied(tmp_path / "untied", tiny_llama))})
    assert calibrated.run(*CASES[case]) == 0
    assert [BORROWED in log for log in logs_of(calibrated)] == [False, True]
    sweep = read_sweep(calibrated.folders[-1])
    assert not (sweep.folder / FOLDER).exists()
    for point, row in zip(sweep.points, calibrated.table(), strict=True):
        shared = results(pathlib.Path(row["folder"]))
        same(shared, results(run_recipe(point.recipe, force=True).folder))


def test_two_processes_share_blocks_and_give_the_table_of_one(calibrated):
    swept = ["evaluation.confidence=0.9,0.8,0.7"]
    assert calibrated.run(*swept, "--jobs", "2", "--threads", "1", launcher="processes") == 0
    together = calibrated.table()
    assert sum(BORROWED in log for log in logs_of(calibrated)) == 2
    shutil.rmtree(calibrated.folder / "outputs")
    assert calibrated.run(*swept, "--threads", "1") == 0
    assert [row | {"folder": ""} for row in calibrated.table()] == [row | {"folder": ""} for row in together]


@pytest.mark.parametrize(
    ("where", "point", "said"),
    [("lend", 0, "blocks: not shared with other runs"), ("borrow", 1, "blocks: those of another run cannot be copied")],
)
def test_points_that_cannot_keep_blocks_for_each_other_are_done_all_the_same(
    calibrated, monkeypatch, where, point, said
):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ptq.run.kept.kept_pass.KeptPass.{where}", full)
    assert calibrated.run("evaluation.confidence=0.9,0.8") == 0
    logs = logs_of(calibrated)
    assert said in logs[point] and not any(BORROWED in log for log in logs)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"evaluation": {"confidence": 0.5, "chunk": 7, "resamples": 100}}, True),
        ({"scheme": {"weight": {"bits": 4}, "head": {"bits": 8}}}, True),
        ({"export": {"format": "compressed-tensors"}}, True),
        ({"scheme": {"weight": {"bits": 4}, "embedding": {"bits": 8}, "head": {"bits": 8}}}, False),
        ({"scheme": {"weight": {"bits": 3}}}, False),
        ({"evaluation": {"windows": 3}}, False),
        ({"calibration": {"samples": 3}}, False),
        ({"steps": {"gptq": {"act_order": False}}}, False),
        ({"steps": {"rtn": {}}}, False),
    ],
)  # fmt: skip
def test_only_what_the_blocks_do_not_see_may_differ(tiny_llama, changes, same):
    content = {
        "name": "a",
        "model": {"path": str(tiny_llama)},
        "scheme": {"weight": {"bits": 4}},
        "steps": {"gptq": {}},
    }
    assert (blocks_of(recipe_from(content)) == blocks_of(recipe_from(content | changes))) is same


def test_points_are_taken_so_that_those_at_work_wait_least_for_one_another(tiny_llama):
    content = {
        "name": "a",
        "model": {"path": str(tiny_llama)},
        "scheme": {"weight": {"bits": 4}},
        "steps": {"gptq": {}},
    }
    recipe = recipe_from(content)
    points = []
    for samples in (2, 3, 4):
        for confidence in (0.9, 0.8):
            calibration = dataclasses.replace(recipe.calibration, samples=samples)
            evaluation = dataclasses.replace(recipe.evaluation, confidence=confidence)
            made = dataclasses.replace(recipe, calibration=calibration, evaluation=evaluation)
            points.append(Point(len(points) + 1, (), made))
    assert [p.number for p in in_turn(points, 1)] == [1, 2, 3, 4, 5, 6]
    assert [p.number for p in in_turn(points, 2)] == [1, 3, 2, 4, 5, 6]
