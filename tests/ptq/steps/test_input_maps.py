"""wush and affine: nothing but rounding changes on every architecture, four bits lose less, and the maps are counted and kept."""

import json

import pytest

from ptq.config.schema import recipe_from
from ptq.errors import UserError
from ptq.run.experiment import run
from ptq.steps._registry import build_steps
from ptq.testing import ARCHITECTURES, byte_tokenizer, random_tiny

TOKEN4 = {"bits": 4, "granularity": "token", "dynamic": True}
W4A4 = {"weight": {"bits": 4}, "input": TOKEN4}
STEPS = {"wush": {}, "affine": {"steps": 8}}


def figures(tmp_path, model, scheme, steps, **changes):
    """The metrics of a run, its folder and its log."""
    base = {
        "name": "mapped",
        "model": {"path": str(model)},
        "calibration": {"samples": 4, "length": 32},
        "evaluation": {"windows": 8, "length": 32},
        "scheme": scheme,
        "steps": steps,
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    folder = run(recipe_from({**base, **changes}))
    return json.loads((folder / "metrics.json").read_text()), folder, (folder / "run.log").read_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", STEPS)
def test_a_mapped_network_computes_what_it_did_on_every_architecture(tmp_path, architecture, name):
    model = random_tiny(architecture)
    model.resize_token_embeddings(258)
    folder = tmp_path / architecture
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    # With no solver nothing is rounded: what is compared is the map and its inverse.
    metrics, _, log = figures(tmp_path, folder, {"input": TOKEN4}, {name: STEPS[name]})
    assert metrics["kl_mean"] < 1e-6
    assert f"{name}: " in log and "expected error" in log
