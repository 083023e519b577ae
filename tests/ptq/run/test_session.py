"""What the store gives to a run is what the run would have computed itself: its key holds everything that this depends on."""

import pytest
import torch

from ptq.config.building import recipe_from
from ptq.run.baseline import baseline_of
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from ptq.run.statistics_pass import statistics_of


@pytest.fixture
def results_of(tmp_path, tiny_opt):
    """Returns a function: the baseline's losses and the statistics' maxima of a text and a type, by way of a store."""
    text = tmp_path / "text.txt"

    def results(store, words, dtype):
        # Always the same file, so that the text has the same name whatever is in it.
        text.write_text(words * 200)
        source = {"source": "file", "path": str(text)}
        recipe = recipe_from({
            "name": "session", "model": {"path": str(tiny_opt), "dtype": dtype}, "steps": {"rtn": {}},
            "scheme": {"weight": {"bits": 8}}, "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / store),
            "data": {"calibration": source, "evaluation": source, "allow_overlap": True},
            "calibration": {"samples": 2, "length": 16}, "evaluation": {"windows": 2, "length": 16},
        })  # fmt: skip
        with open_session(recipe, Journal()) as session:
            losses = baseline_of(session, session.evaluation_tokens()).losses
            statistics, _ = statistics_of(session)
        return losses, torch.cat([s.absmax for _, s in sorted(statistics.inputs.items())])

    return results


@pytest.mark.parametrize(
    ("words", "dtype"), [("another text it is, ", "auto"), ("the first text, ", "float32")], ids=["tokens", "type"]
)
def test_a_baseline_and_statistics_of_other_tokens_or_another_type_are_not_taken_for_these(results_of, words, dtype):
    # On a CPU both types are computed in float32: what the weights were rounded to is all that tells them apart.
    first = results_of("shared", "the first text, ", "auto")
    found, alone = results_of("shared", words, dtype), results_of("alone", words, dtype)
    for before, after, expected in zip(first, found, alone, strict=True):
        assert torch.equal(after, expected) and not torch.equal(after, before)
    again = results_of("shared", "the first text, ", "auto")
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
