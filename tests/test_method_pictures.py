"""The pictures of docs/methods.md: every method has a paragraph and one picture, and the command that draws them knows its names."""

import pathlib
import re
import types

import pytest
import torch
from PIL import Image

from experiments.method_pictures.__main__ import PICTURES, main
from experiments.method_pictures.canvas import save
from experiments.method_pictures.material import Read
from ptq.cli.app import main as ptq_main

pytestmark = pytest.mark.usefixtures("drawn")
DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")
KEEP_PICTURE_BYTES = 60_000
OF_ONE_LINEAR = ["rtn", "hqq", "gptq", "lowrank", "smooth", "awq", "wush", "affine", "clip", "cluster"]


def listed_steps(capsys):
    assert ptq_main(["list", "steps"]) == 0
    return re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.M)


def test_every_step_that_is_listed_has_a_paragraph_and_under_it_a_picture_with_alt_text_and_a_caption(capsys):
    steps = listed_steps(capsys)
    assert {"rtn", "tune", "prefix"} <= set(steps)
    paragraphs = dict(re.findall(r"^\*\*(\w+)\*\* (.*?)(?=^\*\*\w+\*\* |^## |\Z)", PAGE, re.M | re.S))
    assert set(steps) == set(paragraphs)
    for step in steps:
        [(alt, path, caption)] = re.findall(r"^!\[(.+)\]\((.+)\)\n\*(.+)\*$", paragraphs[step], re.M)
        assert path == f"methods/{step}.png" and len(alt) > 20 and len(caption) > 20


def test_the_pictures_are_those_that_the_command_draws_small_and_as_wide_as_a_page():
    assert {path.stem for path in (DOCS / "methods").iterdir()} == set(PICTURES)
    for name in PICTURES:
        path = DOCS / "methods" / f"{name}.png"
        assert path.stat().st_size < KEEP_PICTURE_BYTES
        with Image.open(path) as image:
            assert image.size[0] == 900


def test_the_cache_has_its_picture_on_its_own_page_and_both_pages_name_the_command():
    cache = (DOCS / "kv-cache.md").read_text(encoding="utf-8")
    assert re.search(r"^!\[.+\]\(methods/cache.png\)$", cache, re.M)
    assert all("python -m experiments.method_pictures" in page for page in (PAGE, cache))


def test_an_unknown_picture_is_refused_with_the_nearest_before_anything_is_drawn(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["rtn", "gtpq", "--folder", str(tmp_path)])
    assert refused.value.code == 2
    assert capsys.readouterr().err == "error: gtpq: no such picture; did you mean 'gptq'?\n"
    with pytest.raises(SystemExit):
        main(["rtn", "--folder", str(tmp_path / "none")])
    assert "none is no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def material():
    """Linears of no model, with an outlying channel."""
    generator = torch.Generator().manual_seed(0)
    reads = {}
    for label in ("q, k, v", "o", "gate, up", "down"):
        x = torch.randn(768, 256, generator=generator)
        x[:, 3] *= 20
        reads[label] = Read(label, (label,), x[:512], x[512:], torch.randn(160, 256, generator=generator))
    return types.SimpleNamespace(reads=reads)


@pytest.mark.parametrize("name", OF_ONE_LINEAR)
@torch.no_grad()
def test_a_picture_of_one_linear_is_drawn_from_whatever_linear_it_is_and_prints_its_figures(name, material, tmp_path):
    drawn = PICTURES[name](material)
    path = tmp_path / "a.png"
    save(drawn, path)
    with Image.open(path) as image:
        assert image.size[0] == 900
    assert path.stat().st_size < KEEP_PICTURE_BYTES
    assert all(re.search(r"\d", line) for line in drawn.lines) and drawn.lines
