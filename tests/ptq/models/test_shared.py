"""Runs that share a load: each gets the model as it was read, whatever the runs before it did to theirs."""

import dataclasses
import importlib

import pytest
import torch

from ptq.config.building import recipe_from
from ptq.data.sources import read_text
from ptq.errors import UserError
from ptq.files.store import Store
from ptq.models.shared import Shared
from ptq.run.experiment import finished_before, run_recipe

STATIC = {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}}
ATTENTION = {**STATIC, "key": {"bits": 8, "granularity": "token", "dynamic": True}}
POINTS = (
    (STATIC, {"smooth": {"alpha": 0.5}, "rtn": {}}),
    (ATTENTION, {"rotate": {}, "rtn": {}}),
    ({"weight": {"bits": 4}}, {"gptq": {}}),
)


def make(folder, model, scheme, steps):
    return recipe_from(
        {
            "name": "shared",
            "model": {"path": str(model)},
            "calibration": {"samples": 4, "length": 64},
            "evaluation": {"windows": 4, "length": 64},
            "scheme": scheme,
            "steps": steps,
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
    )


@pytest.mark.parametrize(("kind", "room"), [("llama", 1 << 30), ("llama", 0), ("llama", 1 << 16), ("opt", 1 << 30)])
def test_runs_that_share_a_load_give_the_bits_of_runs_by_themselves(tmp_path, request, kind, room):
    model = request.getfixturevalue(f"tiny_{kind}")
    shared = Shared(room=room)
    together = [run_recipe(make(tmp_path / "a", model, *point), shared=shared).metrics for point in POINTS]
    alone = [run_recipe(make(tmp_path / "b", model, *point)).metrics for point in POINTS]
    assert shared.loads == 1
    for one, other in zip(together, alone, strict=True):
        assert one["window_losses"] == other["window_losses"]
        assert one["kl_mean"] == other["kl_mean"]
        assert one["token_statistics"] == other["token_statistics"]
        assert one["identity"] == other["identity"]
    copies = [
        shared.load(
            make(tmp_path, model, *POINTS[0]).model, make(tmp_path, model, *POINTS[0]).execution, Store(tmp_path)
        )
        for _ in "ab"
    ]
    states = [copy.model.state_dict() for copy in copies]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert all(states[0][name].data_ptr() != states[1][name].data_ptr() for name in states[1])


def test_a_model_of_which_there_is_no_room_for_a_copy_is_loaded_for_every_run(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr("ptq.models.shared.SPARE", 1e12)
    shared, recipe = Shared(), make(tmp_path, tiny_llama, *POINTS[0])
    for _ in range(2):
        shared.load(recipe.model, recipe.execution, Store(tmp_path))
    assert shared.loads == 2


def test_a_finished_run_is_known_without_reading_the_texts_again(tmp_path, tiny_llama, monkeypatch):
    shared, recipe = Shared(), make(tmp_path, tiny_llama, *POINTS[0])
    assert finished_before(recipe, shared) is None
    folder = run_recipe(recipe, shared=shared).folder
    assert finished_before(recipe, shared) == folder
    monkeypatch.setattr("ptq.models.shared.kept_tokens", lambda *args: pytest.fail("drawn again"))
    assert finished_before(recipe, shared) == folder


def test_a_run_that_was_finished_reads_each_text_once_and_builds_no_network(tmp_path, tiny_llama, monkeypatch, capsys):
    recipe = make(tmp_path, tiny_llama, *POINTS[0])
    first = run_recipe(recipe)
    read = []

    def counted(config, field):
        read.append(field)
        return read_text(config, field)

    def built(*arguments, **options):
        raise AssertionError("a network was built")

    monkeypatch.setattr("ptq.data.kept_tokens.read_text", counted)
    monkeypatch.setattr("ptq.run.preflight.skeleton", built)
    monkeypatch.setattr("ptq.run.experiment.open_session", built)
    assert run_recipe(recipe).folder == first.folder
    assert sorted(read) == ["data.calibration", "data.evaluation"]
    assert "finished before" in capsys.readouterr().out


def counted(monkeypatch, place):
    """Counts the calls of a function, by its full name."""
    calls = []
    module, _, name = place.rpartition(".")
    real = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(place, lambda *arguments, **options: calls.append(name) or real(*arguments, **options))
    return calls


@pytest.mark.parametrize(("room", "runs", "comparisons"), [(1 << 30, 1, 0), (0, 2, 2)])
def test_outputs_of_unquantized_blocks_and_what_the_baseline_finds_likely_are_computed_once_where_there_is_room(
    tmp_path, tiny_llama, monkeypatch, room, runs, comparisons
):
    outputs = counted(monkeypatch, "ptq.steps._proof.telling_output")
    likely = counted(monkeypatch, "ptq.evaluation.token_comparison._log_probabilities")
    shared = Shared(room=room)
    for alpha in (0.3, 0.6):
        run_recipe(make(tmp_path, tiny_llama, STATIC, {"smooth": {"alpha": alpha}, "rtn": {}}), shared=shared)
    blocks, windows = 4, 4
    assert len(outputs) == runs * blocks
    # By the baseline's own evaluation, which both share, and where there is no room for it by each comparison again.
    assert len(likely) == (1 + comparisons) * windows


def test_where_no_step_asks_for_samples_transforms_are_proved_on_a_few_whole_ones(tmp_path, tiny_llama, monkeypatch):
    seen = []
    real = importlib.import_module("ptq.run.quantize_visitor").output_before
    monkeypatch.setattr(
        "ptq.run.quantize_visitor.output_before", lambda *words: seen.append(tuple(words[3].shape[:2])) or real(*words)
    )
    recipe = make(tmp_path, tiny_llama, STATIC, {"smooth": {}, "rtn": {}})
    for length, samples in ((48, 11), (240, 3)):
        calibration = dataclasses.replace(recipe.calibration, samples=16, batch_size=16, length=length)
        run_recipe(dataclasses.replace(recipe, calibration=calibration))
        assert set(seen[-4:]) == {(samples, length)}


def test_what_is_kept_of_a_model_goes_with_it(tmp_path, tiny_llama, tiny_opt):
    shared = Shared(room=1 << 30)
    for model in (tiny_llama, tiny_opt):
        recipe = make(tmp_path, model, *POINTS[0])
        shared.load(recipe.model, recipe.execution, Store(tmp_path))
        assert shared.of_model("kept", lambda: torch.zeros(1)).item() == 0
        assert shared.of_model("kept", lambda: torch.ones(1)).item() == 0
    assert shared.loads == 2
    assert Shared(models=False, room=1 << 30).of_model("kept", lambda: torch.ones(1)).item() == 1


def test_a_transform_that_changes_the_function_is_found_where_the_output_before_is_remembered(
    tmp_path, tiny_llama, monkeypatch
):
    shared = Shared(room=1 << 30)
    run_recipe(make(tmp_path, tiny_llama, STATIC, {"smooth": {"alpha": 0.3}, "rtn": {}}), shared=shared)
    monkeypatch.setattr("ptq.steps.transforms.smooth.multiply_columns", lambda weight, scale: None)
    with pytest.raises(UserError, match=r"steps.smooth: changes the output of model.layers.0"):
        run_recipe(make(tmp_path, tiny_llama, STATIC, {"smooth": {"alpha": 0.6}, "rtn": {}}), shared=shared)
