"""What the store gives to a run is what the run would have computed itself: its key holds everything that this depends on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.config.building import recipe_from
from ptq.run.baseline import baseline_of
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from ptq.run.statistics_pass import statistics_of


@pytest.fixture
def models(tmp_path, tiny_opt):
    """A model, and one of the same shapes with another weight, by name."""
    other = tmp_path / "other"
    shutil.copytree(tiny_opt, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("fc1.weight"))
    save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors", {"format": "pt"})
    return {"one": tiny_opt, "other": other}


@pytest.fixture
def results_of(tmp_path, models):
    """Returns a function: the baseline's losses and the statistics' maxima of a model, a text and a type, by way of a store."""
    text = tmp_path / "text.txt"

    def results(store, model="one", words="the first text, ", dtype="auto"):
        # Always the same file, so that the text has the same name whatever is in it.
        text.write_text(words * 200)
        source = {"source": "file", "path": str(text)}
        recipe = recipe_from({
            "name": "session", "model": {"path": str(models[model]), "dtype": dtype}, "steps": {"rtn": {}},
            "scheme": {"weight": {"bits": 8}}, "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / store),
            "data": {"calibration": source, "evaluation": source, "allow_overlap": True},
            "calibration": {"samples": 2, "length": 16}, "evaluation": {"windows": 2, "length": 16},
        })  # fmt: skip
        with open_session(recipe, Journal()) as session:
            losses = baseline_of(session, session.evaluation_tokens()).losses
            statistics, _ = statistics_of(session)
        return losses, torch.cat([s.absmax for _, s in sorted(statistics.inputs.items())])

    return results


# On a CPU `auto` rounds weights to fp16 and computes in float32: each of the two types differs from its own alone.
@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"words": "another text it is, "}, {"dtype": "float32"}, {"dtype": "float16"}],
    ids=["weights", "tokens", "baseline type", "arithmetic type"],
)
def test_what_was_computed_of_another_model_text_or_type_is_not_taken_for_these(results_of, change):
    first = results_of("shared")
    found, alone = results_of("shared", **change), results_of("alone", **change)
    for before, after, expected in zip(first, found, alone, strict=True):
        assert torch.equal(after, expected) and not torch.equal(after, before)
    assert all(torch.equal(a, b) for a, b in zip(results_of("shared"), first, strict=True))
