"""A recipe for sweeps of a tiny model, and running them by the command line."""

import csv
import json
import pathlib

import pytest
import yaml

from ptq.cli.app import main


class Sweeps:
    """Runs sweeps of one small recipe under a folder, and reads what they leave."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.folder = folder
        self.main = folder
        self.recipe = folder / "small.yaml"
        content = {
            "model": {"path": str(model)},
            "calibration": {"samples": 2, "length": 32},
            "evaluation": {"windows": 4, "length": 32, "resamples": 200},
            "scheme": {"weight": {"bits": 4}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}},
            "steps": {"smooth": {"alpha": 0.5}, "rtn": {}},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
        self.recipe.write_text(yaml.safe_dump(content, sort_keys=False))

    def run(self, *words: str, launcher: str = "here") -> int:
        return main(["run", "--config", str(self.recipe), "-m", "--launcher", launcher, *words])

    @property
    def folders(self) -> list[pathlib.Path]:
        return sorted((self.folder / "outputs" / "sweeps" / "small").iterdir())

    def table(self, folder: pathlib.Path | None = None) -> list[dict[str, str]]:
        """What points.csv holds, without what depends on the clock."""
        place = folder or self.folders[-1]
        rows = list(csv.DictReader((place / "points.csv").open()))
        assert [row["point"] for row in rows] == [
            str(r["point"]) for r in json.loads((place / "points.json").read_text())
        ]
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture
def sweeps(tmp_path, tiny_llama):
    return Sweeps(tmp_path, tiny_llama)


@pytest.fixture(scope="session")
def swept(tmp_path_factory, tiny_llama):
    """A sweep that has been run once, with a refused point: for tests that change nothing of it."""
    made = Sweeps(tmp_path_factory.mktemp("swept"), tiny_llama)
    assert made.run("steps.smooth.alpha=0.3,0.5", "scheme.weight.bits=4,8,9") == 1
    [made.main] = made.folders
    return made
