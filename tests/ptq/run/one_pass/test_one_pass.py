"""One pass over the checkpoint: the bits of several, each tensor read once, a finished block that is the export's own shard."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.models.loading import fingerprint_of
from ptq.run.experiment import run
from ptq.run.kept.kept_pass import RESUME
from tests.tools.interrupted import Killed, interrupted
from tests.tools.one_pass import copied, exported, make, name_at, same_export
from tests.tools.same_bits import results, same

pytest.importorskip("compressed_tensors")

TARGETED = {"gptq": {"target": "original"}}


@pytest.mark.parametrize(("model", "steps", "export"), [
    ("tiny_llama", TARGETED, "compressed-tensors"),
    ("tiny_mixtral", None, "compressed-tensors"),
    ("tiny_llama", {"rtn": {}}, "gptq"),
])  # fmt: skip
def test_one_pass_has_the_bits_of_several(tmp_path, request, monkeypatch, model, steps, export):
    model = request.getfixturevalue(model)
    one = run(make(tmp_path / "one", model, steps, export))
    monkeypatch.setattr("ptq.run.experiment.goes_in_one_pass", lambda *args: False)
    several = run(make(tmp_path / "several", model, steps, export))
    a, b = results(one), results(several)
    assert not a[2] and b[2], "no codes lie beside the shards"
    same((a[0], a[1], {}), (b[0], b[1], {}))
    same_export(exported(one, export), exported(several, export))
    # What both have found is of use to other runs, under the same keys.
    kinds = [
        {p.parent.name for p in (tmp_path / w / "store").glob("*/*/entry.safetensors")} for w in ("one", "several")
    ]
    entries = [{p.parent.name for p in (tmp_path / w / "store").rglob("entry.safetensors")} for w in ("one", "several")]
    assert entries[0] == entries[1] and kinds[0] == kinds[1]


@pytest.mark.parametrize("steps", [None, {"rotate": {"online": []}, "gptq": {}}], ids=["plain", "turned"])
def test_each_tensor_of_the_checkpoint_is_read_once_and_written_once(tmp_path, tiny_mixtral, read, steps):
    folder = run(make(tmp_path, tiny_mixtral, steps))
    blocks = {place: n for place, n in read.items() if "layers" in name_at(tiny_mixtral, place)}
    assert len(blocks) > 50 and set(blocks.values()) == {1}
    # Nothing is kept beside the export, and what is known of the weights says so to the next run.
    assert not list(folder.rglob("block-*")) and not (folder / RESUME).exists()
    assert (folder / "export" / "compressed-tensors" / "model.safetensors.index.json").is_file()
    before = sum(read.values())
    again = recipe_from({**make(tmp_path, tiny_mixtral, steps).as_dict(), "name": "again"})
    metrics = json.loads((run(again) / "metrics.json").read_text())
    assert metrics["weight_fingerprint"] == json.loads((folder / "metrics.json").read_text())["weight_fingerprint"]
    assert sum(read.values()) - before <= len(blocks) + 20, "neither links nor baseline are computed again"


def test_the_export_is_loaded_by_transformers_and_computes_what_was_evaluated(tmp_path, tiny_mixtral):
    folder = run(make(tmp_path, tiny_mixtral))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "export" / "compressed-tensors", dtype="float32"
    )
    ids = (torch.arange(24) * 5 % 90)[None]
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_mixtral, dtype="float32")
    with torch.no_grad():
        a, b = loaded(ids).logits, before(ids).logits
    assert 0 < float((a - b).norm() / b.norm()) < 0.3


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_run_killed_after_any_block_goes_on_there_and_ends_with_the_same_export(
    tmp_path, tiny_mixtral, monkeypatch, read, capsys, blocks
):
    expected = run(make(tmp_path / "whole", tiny_mixtral))
    recipe = make(tmp_path / "killed", tiny_mixtral)
    interrupted(monkeypatch, recipe, blocks)
    read.clear()
    capsys.readouterr()
    folder = run(recipe)
    assert f"resumed after block {blocks} of 3" in capsys.readouterr().out
    done = {p for p in read if any(f"layers.{i}." in name_at(tiny_mixtral, p) for i in range(blocks))}
    assert not done, "what was finished is not read again, for the digest of the weights either"
    same_export(exported(folder), exported(expected))
    same((*results(folder)[:2], {}), (*results(expected)[:2], {}))


def test_weights_that_only_look_other_are_believed_and_those_that_are_other_are_not(
    tmp_path, tiny_llama, monkeypatch, capsys
):
    model = copied(tiny_llama, tmp_path / "model")
    recipe = make(tmp_path, model)
    interrupted(monkeypatch, recipe, 2)
    [shard] = model.glob("*.safetensors")
    os.utime(shard, ns=(1, 1))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("ptq.run.experiment.report", stopped)
        with pytest.raises(Killed):
            run(recipe)
    assert "resumed after block 2 of 4" in capsys.readouterr().out
    tensors = load_file(shard)
    name = next(key for key in tensors if "layers.0" in key and "down_proj" in key)
    tensors[name][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    folder = run(recipe)
    out = capsys.readouterr().out
    assert "made from other weights, data, options or code: done again" in out and "resumed" not in out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["weight_fingerprint"] == fingerprint_of(recipe.model)


def stopped(*args):
    raise Killed


def test_an_expert_with_a_weight_that_is_no_number_is_named_and_nothing_is_left_half_written(
    tmp_path, tiny_mixtral, capsys
):
    model = copied(tiny_mixtral, tmp_path / "model")
    [shard] = model.glob("*.safetensors")
    tensors = load_file(shard)
    name = next(key for key in tensors if "layers.1" in key and "experts.5" in key)
    for bad in (float("nan"), float("inf")):
        tensors[name][3, 2] = bad
        save_file(tensors, shard, metadata={"format": "pt"})
        for weights in ("offloaded", "resident"):
            recipe = make(tmp_path, model, weights=weights)
            path = tmp_path / f"{weights}.yaml"
            path.write_text(json.dumps(recipe.as_dict()))
            capsys.readouterr()
            assert main(["run", "--config", str(path)]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: model.path: model.layers.1.mlp.experts.") and error.count("\n") == 1
            assert f"in {shard} holds NaN or inf" in error
    assert not list((tmp_path / "outputs").rglob("export")) and not list((tmp_path / "outputs").rglob("metrics.json"))


def test_a_disk_that_is_full_in_the_middle_is_said_and_the_run_goes_on_when_it_is_not(
    tmp_path, tiny_llama, monkeypatch, capsys
):
    recipe = make(tmp_path, tiny_llama)
    import ptq.run.one_pass.block_files as files

    write, done = files.write_shard, []

    def full(path, tensors, modules):
        done.append(path)
        if len(done) == 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors, modules)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_shard", full)
        with pytest.raises((OSError, UserError), match="[Nn]o space left"):
            run(recipe)
    capsys.readouterr()
    folder = run(recipe)
    assert "resumed after block 2 of 4" in capsys.readouterr().out
    assert exported(folder)[0]
