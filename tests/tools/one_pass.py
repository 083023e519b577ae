"""Recipes of runs that see each block once."""

from ptq.config.building import recipe_from

GROUPS = {"weight": {"bits": 4, "granularity": "group", "group_size": 32}}


def make(folder, model, steps=None, export="compressed-tensors", **execution):
    return recipe_from(
        {
            "name": "once",
            "model": {"path": str(model), "dtype": "float32"},
            "calibration": {"samples": 4, "length": 64, "batch_size": 2},
            "evaluation": {"windows": 2, "length": 64},
            "scheme": GROUPS,
            "steps": {"gptq": {}} if steps is None else steps,
            "execution": {"weights": "offloaded", **execution},
            "export": {"format": export},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
    )


def copied(model, folder):
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
