"""What an ablation found, as a section of a document: best point, who is told apart from it, table, picture; run by its command."""

import re

import pytest
import yaml

from experiments.ablations import main, with_section
from ptq.config.schema import TextConfig
from ptq.data.sources import read_text


def test_a_section_is_written_anew_and_the_others_stay():
    text = with_section("", "a", "## a\n\nfirst\n")
    text = with_section(text, "b", "## b\n\nsecond\n")
    again = with_section(text, "a", "## a\n\nthird\n")
    assert again == text.replace("first", "third") and again.count("## ") == 2
    assert again.startswith("# What the shipped ablations found\n") and again.endswith("second\n")


@pytest.mark.usefixtures("drawn")
def test_an_ablation_is_run_and_its_finding_written(tmp_path, tiny_llama, capsys):
    text = tmp_path / "text.txt"
    text.write_text(read_text(TextConfig(split="test"), "text").joined[:8000])
    recipe = {
        "data": {"evaluation": {"source": "file", "path": str(text)}},
        "model": {"path": str(tiny_llama)}, "calibration": {"length": 64}, "evaluation": {"windows": 8, "length": 64}, "scheme": {"weight": {"bits": 4}},
        "steps": {"rtn": {}}, "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    overrides = ["scheme.weight.bits=2,8", "scheme.weight.symmetric=true"]
    (tmp_path / "bits.yaml").write_text(
        yaml.safe_dump({"recipe": str(tmp_path / "small.yaml"), "overrides": overrides})
    )
    docs = tmp_path / "docs"
    docs.mkdir()
    main([str(tmp_path / "bits.yaml"), "evaluation.resamples=200", "--docs", str(docs)])
    text = (docs / "ablations.md").read_text()
    assert "## bits" in text and f"python main.py --ablation {tmp_path}/bits.yaml evaluation.resamples=200" in text
    assert re.search(r"It has 8\.\d\d bits a weight, and the points have 2\.\d\d to 8\.\d\d: read it beside them", text)
    assert "Best is bits 8" in text and "Worse, paired over 8 windows" in text and "bits 2" in text
    assert (docs / "ablations" / "bits.png").read_bytes()[:4] == b"\x89PNG"
    rows = [line for line in text.splitlines() if line.startswith(("| 8 |", "| 2 |"))]
    assert len(rows) == 2 and rows[0].startswith("| 8 |") and "[" in rows[0]
