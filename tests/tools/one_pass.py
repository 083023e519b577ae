"""Recipes of runs that see each block once."""

import json
from collections import Counter

import torch
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.files.safetensors_file import StoredTensor, read_header
from ptq.run.experiment import run
from tests.tools.interrupted import interrupted
from tests.tools.same_bits import results, same

GROUPS = {"weight": {"bits": 4, "granularity": "group", "group_size": 32}}


def make(folder, model, steps=None, export="compressed-tensors", scheme=None, **execution):
    return recipe_from(
        {
            "name": "once",
            "model": {"path": str(model), "dtype": "float32"},
            "calibration": {"samples": 4, "length": 64, "batch_size": 2},
            "evaluation": {"windows": 2, "length": 64},
            "scheme": scheme or GROUPS,
            "steps": {"gptq": {}} if steps is None else steps,
            "execution": {"weights": "offloaded", **execution},
            "export": export and {"format": export},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
    )


def copied(model, folder):
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def exported(folder, name="compressed-tensors"):
    """Every tensor of the export, and its config without what says how it was packed into files."""
    found = folder / "export" / name
    tensors = {key: value for shard in sorted(found.glob("*.safetensors")) for key, value in load_file(shard).items()}
    return tensors, json.loads((found / "config.json").read_text())


def same_export(a, b):
    """Asserts that two of `exported` are equal."""
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(tensor, b[0][key]) for key, tensor in a[0].items())


def counted_reads(monkeypatch):
    """Counts from now on how often each stored tensor is read, by the place of its bytes: (file, start, end)."""
    found, pieces = Counter(), StoredTensor.pieces

    def counted(self, *args):
        found[self.file.name, self.start, self.end] += 1
        return pieces(self, *args)

    monkeypatch.setattr(StoredTensor, "pieces", counted)
    return found


def name_at(model, place):
    """Returns the name of the tensor in the folder `model` that lies, or of which a slice lies, at a place; "" for none."""
    name, start, _ = place
    return next((key for key, stored in read_header(model / name).items() if stored.start <= start < stored.end), "")


def ends_with_the_same_bits(tmp_path, monkeypatch, capsys, *case):
    """Asserts that a run of four blocks that keeps its codes, killed after the second, ends as one that was not; `case` as `make` has it."""
    whole = run(make(tmp_path / "whole", *case, save=True))
    recipe = make(tmp_path / "killed", *case, save=True)
    interrupted(monkeypatch, recipe, 2)
    capsys.readouterr()
    folder = run(recipe)
    assert "resumed after block 2 of 4" in capsys.readouterr().out
    same(results(folder), results(whole))
