"""Recipes of runs that see each block once."""

import json

from safetensors.torch import load_file

from ptq.config.building import recipe_from

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
