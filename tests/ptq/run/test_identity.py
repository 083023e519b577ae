"""Identity: two spellings of one experiment have one folder, a changed method has another, and recipe.yaml says everything."""

import pathlib
import subprocess
import sys

import yaml

from ptq.config.building import recipe_from
from ptq.run.experiment import output_folder, run

ROOT = pathlib.Path(__file__).resolve().parents[3]
W8 = {"bits": 8, "granularity": "channel"}
METHOD = """
from dataclasses import dataclass
from ptq.steps import Transform


@dataclass(frozen=True)
class Options:
    strength: float = 1.0


class Step(Transform):
    def apply(self, block, plan, context):
        factor = {factor}
"""


def make(folder, path, **content):
    plain = {
        "name": "same", "model": {"path": str(path)}, "scheme": {"weight": W8}, "steps": {"smooth": {}, "rtn": {}},
        "calibration": {"samples": 2, "length": 16}, "evaluation": {"windows": 2, "length": 16, "resamples": 100},
        "outputs": str(folder / "outputs"), "store": str(folder / "store"),
    }  # fmt: skip
    return recipe_from({**plain, **content})


def test_an_option_typed_as_its_default_and_one_left_out_are_one_experiment(tmp_path):
    steps = [{"smooth": {}, "rtn": {}}, {"smooth": {"alpha": 0.5}, "rtn": {}}, {"smooth": {"beta": None}, "rtn": {}}]
    folders = {output_folder(make(tmp_path, "x/y", steps=each)) for each in steps}
    assert len(folders) == 1
    whole = {output_folder(make(tmp_path, "x/y", steps={"smooth": {"alpha": 1}})),
             output_folder(make(tmp_path, "x/y", steps={"smooth": {"alpha": 1.0}}))}  # fmt: skip
    assert len(whole) == 1 and not whole & folders
    exports = [{"format": "kuiper"}, {"format": "kuiper", "options": {"build": "llama2"}}]
    assert len({output_folder(make(tmp_path, "x/y", export=each)) for each in exports}) == 1


def test_the_device_that_auto_is_here_is_resolved_first(tmp_path):
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    folders = {output_folder(make(tmp_path, "x/y", execution={"device": device})) for device in ("auto", here)}
    assert len(folders) == 1


def folder_of(tmp_path, factor):
    """Where a run by the method goes whose source has this factor; a process of its own, as two runs are."""
    (tmp_path / "changing.py").write_text(METHOD.format(factor=factor))
    code = (
        f"import sys, pathlib; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from tests.ptq.run.test_identity import make, output_folder\n"
        f"print(output_folder(make(pathlib.Path({str(tmp_path)!r}), 'x/y', steps={{'mine': {{'_target_': 'changing.Step'}}, 'rtn': {{}}}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_changed_method_from_outside_writes_beside_the_old_result(tmp_path):
    assert folder_of(tmp_path, 1.0) == folder_of(tmp_path, 1.0) != folder_of(tmp_path, 2.0)


def test_the_written_recipe_has_every_option_and_is_the_same_experiment_again(tmp_path, tiny_opt):
    recipe = make(tmp_path, tiny_opt)
    folder = run(recipe)
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert set(written["steps"]["smooth"]) >= {"alpha", "beta", "search", "candidates", "links"}
    assert written["execution"]["device"] != "auto"
    assert output_folder(recipe_from(written)) == folder
