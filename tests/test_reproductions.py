"""Every command of docs/reproductions.md and docs/kv-cache.md is a recipe whose parts fit together."""

import pathlib
import re
import shlex

import pytest

from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.run.experiment import checked

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "reproductions.md").read_text(encoding="utf-8")
[PREFIX] = re.findall(r"`python main\.py --config (smollm2-135m_w8a8 data=smol-wt2 [^`]*)`", PAGE)
SHORT = re.findall(r"`P ([^`]*)`", PAGE)
LONG = re.findall(r"^    python main\.py --config ([^#\n]*)", (DOCS / "kv-cache.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("words", [*(f"{PREFIX} {command}" for command in SHORT), *LONG])
def test_a_command_fits_together(words, monkeypatch):
    monkeypatch.setenv("PTQ_DATA", "/somewhere")
    name, *overrides = shlex.split(words)
    [job] = compose_jobs(catalog.locate(name.removesuffix(".yaml")), overrides)
    assert list(checked(job.recipe)[1]) == list(job.recipe.steps)


def test_every_row_of_ours_has_its_command():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| method")]
    assert len(rows) >= 15
    assert all("`P " in row for row in rows)
