"""Shared text of calibration and evaluation: found at every offset, counted exactly, and never where there is none."""

import json
import pathlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.config.building import recipe_from
from ptq.config.schema import TextConfig
from ptq.data.overlap import RUN_CHARACTERS, check_overlap, overlap_of
from ptq.data.sampling import Tokens, fingerprint
from ptq.data.sources import read_text
from ptq.errors import UserError
from ptq.run.experiment import check_recipe, run
from ptq.testing import byte_tokenizer


class Words:
    """A tokenizer whose tokens have five characters, so that 64 of them are compared."""

    def decode(self, ids):
        return "abcde" * len(ids)


def tokens(ids, begin=()):
    return Tokens(ids, fingerprint(ids), "a/text", begin)


def distinct(windows, length, first=0):
    """Windows of tokens that occur once."""
    return torch.arange(first, first + windows * length).view(windows, length)


def brute(ours, theirs, run):
    """Evaluation windows and tokens in shared runs, by comparing tuples."""
    seen = {tuple(row[i : i + run]) for row in ours.tolist() for i in range(len(row) - run + 1)}
    found = [
        {i + k for i in range(len(row) - run + 1) if tuple(row[i : i + run]) in seen for k in range(run)}
        for row in theirs.tolist()
    ]
    return sum(map(bool, found)), sum(map(len, found))


@given(st.integers(0, 136), st.integers(0, 136), st.integers(1, 128), st.integers(0, 2), st.integers(0, 3))
def test_a_planted_copy_is_found_at_every_offset_exactly_where_it_is_long_enough(here, there, length, sample, window):
    ours, theirs = distinct(3, 200), distinct(4, 200, first=10_000)
    copied = ours[sample, here : here + length]
    theirs[window, there : there + len(copied)] = copied[: 200 - there]
    found = overlap_of(Words(), tokens(ours), tokens(theirs))
    assert (found.windows, found.tokens) == brute(ours, theirs, 64)
    assert found.copied == (found.tokens > 0) == (min(length, 200 - here, 200 - there) >= 64)
    assert found.first == ((window, sample) if found.copied else None)


@given(st.integers(0, 2**32), st.integers(16, 40))
def test_few_kinds_of_tokens_are_counted_as_a_comparison_of_tuples_counts_them(seed, length):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randint(2, (rows, 40), generator=generator) for rows in (6, 5))
    ours = ours[:, :length]
    found = overlap_of(Words(), tokens(ours), tokens(theirs))
    assert found.run == max(16, length // 2)
    assert (found.windows, found.tokens) == brute(ours, theirs, found.run)


def test_what_begins_a_window_hides_no_copy():
    ours, theirs = distinct(2, 100), distinct(2, 99, first=5000)
    theirs[1, :] = ours[0, 1:]
    begun = torch.cat([torch.full((2, 1), 9), theirs], dim=1)
    assert overlap_of(Words(), tokens(ours), tokens(begun, ("<s>",))).tokens == 99


def test_windows_shorter_than_two_runs_count_where_a_quarter_of_either_side_is_shared():
    ours, theirs = distinct(8, 48), distinct(40, 48, first=5000)
    theirs[0] = ours[3]
    one = overlap_of(Words(), tokens(ours), tokens(theirs))
    assert (one.run, one.tokens) == (24, 48) and not one.copied
    assert check_overlap(one, tokens(ours), tokens(theirs)) is None
    theirs[1] = ours[2]
    assert overlap_of(Words(), tokens(ours), tokens(theirs)).copied
    assert not overlap_of(Words(), tokens(ours[:, :15]), tokens(theirs)).run


@given(st.floats(0, 1), st.integers(32, 128))
def test_short_windows_of_one_text_are_found_at_every_shift(shift, length):
    text, start = torch.arange(9 * length), round(shift * length)
    ours, theirs = text[: 8 * length].view(8, length), text[start : start + 8 * length].view(8, length)
    assert overlap_of(Words(), tokens(ours), tokens(theirs)).copied


def test_tokens_of_a_byte_are_compared_by_as_much_text():
    ids = torch.tensor(list(b"to be or not to be, that is the question: " * 30)).view(2, -1)
    assert overlap_of(byte_tokenizer(), tokens(ids), tokens(ids)).run == RUN_CHARACTERS


def test_the_parts_of_the_documentation_quote_nothing_of_one_another():
    runs = {}
    for split in ("train", "validation", "test"):
        text = re.sub(r"\s+", " ", read_text(TextConfig(split=split), "x").joined)
        runs[split] = {text[i : i + RUN_CHARACTERS] for i in range(len(text) - RUN_CHARACTERS)}
    assert not (runs["train"] & runs["test"] or runs["train"] & runs["validation"] or runs["validation"] & runs["test"])


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """A tiny run whose texts are given."""

    def made(calibration, evaluation, **options):
        return recipe_from(
            {
                "name": "overlap", "model": {"path": str(tiny_llama)}, "steps": {"rtn": {}},
                "scheme": {"weight": {"bits": 8, "granularity": "channel"}},
                "data": {"calibration": calibration, "evaluation": evaluation, **options},
                "calibration": {"samples": 3, "length": 128}, "evaluation": {"windows": 2, "length": 128},
                "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
            }
        )  # fmt: skip

    return made


def file(path: pathlib.Path, text: str):
    path.write_text(text, encoding="utf-8")
    return {"source": "file", "path": str(path)}


def test_one_text_on_both_sides_is_refused_before_anything_is_loaded(tmp_path, recipe, monkeypatch):
    text = read_text(TextConfig(), "x").joined
    whole, shifted = file(tmp_path / "a.txt", text[:4000]), file(tmp_path / "b.txt", "Shifted by this. " + text[:4000])
    further = file(tmp_path / "c.txt", text[4000:9000])
    monkeypatch.setattr("ptq.models.shared.load", None)
    for both in ((whole, whole), (whole, shifted), ({"source": "docs"}, whole)):
        for act in (run, check_recipe):
            with pytest.raises(UserError, match=r"^data: 2 of 2 evaluation windows .*allow_overlap=true") as error:
                act(recipe(*both))
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="reads docs/test, which data.evaluation.split evaluates on"):
        run(recipe({"source": "docs", "split": "test"}, {"source": "docs", "split": "test"}))
    assert not (tmp_path / "outputs").exists()
    assert check_recipe(recipe(whole, further))


def test_what_is_allowed_runs_and_the_result_says_it(tmp_path, recipe, capsys):
    docs = {"source": "docs", "split": "test"}
    folder = run(recipe(docs, docs, allow_overlap=True))
    found = json.loads((folder / "metrics.json").read_text())
    assert found["overlap"]["allowed"] and found["overlap"]["copied"]
    assert (found["overlap"]["windows"], found["overlap"]["tokens"]) == (2, 256)
    assert found["calibration_source"] == found["evaluation_source"] == "docs/test"
    assert "256 tokens of 2 windows were calibrated on" in capsys.readouterr().out
    apart = json.loads((run(recipe({"source": "docs"}, docs)) / "metrics.json").read_text())
    assert apart["overlap"] == {
        "run": 64, "windows": 0, "tokens": 0, "copied": False, "allowed": False
    }  # fmt: skip


def test_statistics_of_the_evaluation_windows_are_refused(tmp_path, recipe):
    from ptq.run.experiment import collect_statistics

    docs = {"source": "docs", "split": "test"}
    made = recipe(docs, docs)
    value = made.as_dict() | {"calibration": {"samples": 2, "length": 128}}
    path = collect_statistics(
        recipe_from(value | {"data": {"calibration": docs, "evaluation": docs, "allow_overlap": True}})
    )
    value |= {"data": {"evaluation": docs}, "scheme": {"weight": {"bits": 8}, "input": {"bits": 8, "dynamic": False}}}
    value["calibration"]["statistics"] = str(path)
    with pytest.raises(
        UserError, match=r"^calibration.statistics: .* was taken on the evaluation windows \(docs/test\)"
    ):
        run(recipe_from(value))
