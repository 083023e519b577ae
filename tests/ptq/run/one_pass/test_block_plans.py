"""Steps that plan block by block: in one pass they decide what they decide in passes one after another, to the last bit."""

import json
from dataclasses import replace

import pytest
import torch

from ptq.calibration.statistics import Statistics
from ptq.errors import UserError
from ptq.run.experiment import collect_statistics, run
from ptq.run.kept.kept_pass import RESUME
from tests.tools.interrupted import interrupted
from tests.tools.one_pass import GROUPS, ends_with_the_same_bits, exported, make, name_at, same_export
from tests.tools.same_bits import results, same
from tests.tools.tiny_runs import metrics_of

STATIC = {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "dynamic": False}}
TOKENS = {"weight": {"bits": 4}, "input": {"bits": 4, "granularity": "token", "dynamic": True}}
CASES = {
    "awq": ("tiny_llama", GROUPS, {"awq": {}, "gptq": {}}, "gptq"),
    "static ranges of a mixture": ("tiny_mixtral", STATIC, {"smooth": {}, "rtn": {}}, None),
    "maps": ("tiny_llama", TOKENS, {"wush": {}, "clip": {}, "gptq": {}}, None),
    "learned maps": ("tiny_llama", TOKENS, {"affine": {"steps": 2}, "rtn": {}}, None),
    "a rotation": ("tiny_llama", TOKENS, {"rotate": {}, "clip": {}, "gptq": {}}, None),
    "a rotation that is exported": ("tiny_llama", GROUPS, {"rotate": {"online": []}, "gptq": {"target": "original"}}, "gptq"),
    "a rotation of a mixture": ("tiny_mixtral", GROUPS, {"rotate": {"online": []}, "rtn": {}}, "compressed-tensors"),
    "a rotation of LayerNorms": ("tiny_opt", TOKENS, {"rotate": {"online": ["out"]}, "rtn": {}}, None),
    "scales before a rotation": ("tiny_llama", TOKENS, {"smooth": {"search": True, "candidates": [0.4, 0.6]}, "rotate": {"seed": 3}, "clip": {}, "gptq": {}}, None),
    "scales behind a rotation, static ranges": ("tiny_llama", STATIC, {"rotate": {}, "smooth": {}, "gptq": {}}, None),
    "static ranges behind a rotation of a mixture": ("tiny_mixtral", STATIC, {"rotate": {"online": []}, "rtn": {}}, "compressed-tensors"),
    "searches": ("tiny_llama", TOKENS, {"smooth": {"search": True, "candidates": [0.4, 0.6]}, "clip": {}, "gptq": {}}, None),
}  # fmt: skip


def taken(folder):
    """The statistics that runs have kept for later ones."""
    return [Statistics.load(path) for path in sorted((folder / "store").glob("statistics/*/entry.safetensors"))]


def alike(a, b):
    one, other = (s.to_tensors() for s in (a, b))
    return one.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in one.items())


@pytest.mark.parametrize("case", CASES)
def test_what_is_planned_block_by_block_has_the_bits_of_plans_for_the_whole_network(
    tmp_path, request, monkeypatch, case
):
    name, scheme, steps, export = CASES[case]
    model = request.getfixturevalue(name)
    save = export is None
    one = run(make(tmp_path / "one", model, steps, export, scheme, save=save))
    with monkeypatch.context() as patch:
        patch.setattr("ptq.run.experiment.goes_in_one_pass", lambda *args: False)
        several = run(make(tmp_path / "several", model, steps, export, scheme, save=save))
    a, b = results(one), results(several)
    same((*a[:2], a[2] if save else {}), (*b[:2], b[2] if save else {}))
    if export is not None:
        found = exported(one, export)
        same_export(found, exported(several, export))
    assert "plan" in metrics_of(several)["seconds"] and "plan" not in metrics_of(one)["seconds"]
    pictures = [folder / "channels.json" for folder in (one, several)]
    assert pictures[0].is_file() == pictures[1].is_file()
    assert not pictures[0].is_file() or json.loads(pictures[0].read_text()) == json.loads(pictures[1].read_text())
    kept = taken(tmp_path / "one"), taken(tmp_path / "several")
    goes_by_them = bool({"smooth", "awq"} & steps.keys()) or scheme == STATIC
    assert len(kept[0]) == len(kept[1]) == goes_by_them, "all else goes by moments of its own"
    assert all(alike(*pair) for pair in zip(*kept, strict=True))


@pytest.mark.parametrize("known", [False, True], ids=["another store", "the store that knows the weights"])
def test_statistics_from_a_file_go_in_one_pass_too(tmp_path, tiny_llama, monkeypatch, read, known):
    file = tmp_path / "statistics.safetensors"
    place = "one" if known else "elsewhere"
    collect_statistics(make(tmp_path / place, tiny_llama, {"smooth": {}, "rtn": {}}, None, STATIC), file)

    def recipe(folder):
        made = make(tmp_path / folder, tiny_llama, {"smooth": {}, "rtn": {}}, None, STATIC, save=True)
        return replace(made, calibration=replace(made.calibration, statistics=str(file)))

    read.clear()
    one = run(recipe("one"))
    often = {count for place, count in read.items() if "layers" in name_at(tiny_llama, place)}
    assert often == ({1} if known else {2}), "where the digest is not known the weights are read for it"
    assert "plan" not in metrics_of(one)["seconds"]
    monkeypatch.setattr("ptq.run.experiment.goes_in_one_pass", lambda *args: False)
    same(results(one), results(run(recipe("several"))))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_killed_in_the_middle_keeps_its_statistics(tmp_path, tiny_mixtral, monkeypatch, capsys, damaged):
    case = tiny_mixtral, {"smooth": {}, "rtn": {}}, None, STATIC
    whole = run(make(tmp_path / "whole", *case, save=True))
    recipe = make(tmp_path / "killed", *case, save=True)
    interrupted(monkeypatch, recipe, 2)
    if damaged:
        [file] = (tmp_path / "killed" / "outputs").rglob(f"{RESUME}/quantize/block-00000.statistics")
        file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    folder = run(recipe)
    assert "resumed after block 2 of 3" in capsys.readouterr().out
    same(results(folder), results(whole))
    kept = taken(tmp_path / "killed")
    assert len(kept) == (not damaged), "what is not whole is not kept for others"
    assert damaged or alike(kept[0], taken(tmp_path / "whole")[0])
    assert (folder / "channels.png").is_file() == (not damaged)
    again = run(make(tmp_path / "killed", tiny_mixtral, {"smooth": {"alpha": 0.6}, "rtn": {}}, None, STATIC, save=True))
    out = capsys.readouterr().out
    assert again.is_dir() and len(taken(tmp_path / "killed")) == 1, (
        "they are taken again where they are not there, and only there"
    )
    assert "resumed" not in out


def test_a_run_with_maps_that_is_killed_in_the_middle_ends_with_the_same_bits(
    tmp_path, tiny_llama, monkeypatch, capsys
):
    case = tiny_llama, {"wush": {}, "gptq": {}}, None, TOKENS
    ends_with_the_same_bits(tmp_path, monkeypatch, capsys, *case)


def test_a_run_that_takes_statistics_again_behind_a_rotation_and_is_killed_ends_with_the_same_bits(
    tmp_path, tiny_llama, monkeypatch, capsys
):
    case = tiny_llama, {"rotate": {"online": []}, "smooth": {}, "rtn": {}}, None, STATIC
    ends_with_the_same_bits(tmp_path, monkeypatch, capsys, *case)


def test_steps_that_see_the_whole_network_first_are_named_where_blocks_go_over_devices(tmp_path, tiny_llama):
    devices = {"devices": ["cpu", "cpu"]}
    with pytest.raises(UserError, match=r"execution\.devices: cpu, cpu, but steps\.rotate plans for the whole network"):
        run(make(tmp_path, tiny_llama, {"rotate": {"seeds": 2}, "gptq": {}}, None, **devices))
    folder = run(make(tmp_path, tiny_llama, {"awq": {}, "rtn": {}}, "gptq", **devices))
    assert exported(folder, "gptq")[0]
