"""Texts and token windows: what is drawn, and what is refused."""

import json
import pathlib
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.config import TextConfig
from ptq.data.sampling import fingerprint, sample_tokens
from ptq.data.sources import check_source, read_text
from ptq.errors import UserError


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id = 256

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return SimpleNamespace(input_ids=list(text.encode()))


def draw(config, samples=3, length=8, sampling="contiguous", seed=0, bos=False, limit=None):
    return sample_tokens(Bytes(), config, samples, length, sampling, seed, bos, limit, "data.x")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(100)))
    return TextConfig("file", path=str(path))


def test_contiguous_windows_follow_each_other_and_the_tail_is_dropped(text):
    tokens = draw(text, samples=None, length=8)
    assert tokens.ids.shape == (12, 8) and tokens.source == "file/text.txt"
    assert bytes(tokens.ids.flatten().tolist()) == pathlib.Path(text.path).read_bytes()[:96]


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(2, 50))
def test_random_windows_are_pieces_of_the_text_and_the_seed_decides(seed, samples, length):
    config = TextConfig("docs", split="validation")
    whole = read_text(config, "x").joined.encode()
    some = min(samples, 5)
    a, b = (draw(config, some, length, "random", seed) for _ in range(2))
    assert a.fingerprint == b.fingerprint and a.ids.shape == (some, length)
    assert all(bytes(row.tolist()) in whole for row in a.ids)


def test_bos_begins_every_window(text):
    ids = draw(text, bos=True).ids
    assert (ids[:, 0] == 256).all() and ids.shape == (3, 8) and ids[1, 1] == ord("a") + 7


def test_the_fingerprint_knows_ids_and_shape():
    ids = torch.arange(12)
    prints = {fingerprint(ids.view(3, 4)), fingerprint(ids.view(4, 3)), fingerprint(ids.view(3, 4) + 1)}
    assert len(prints) == 3 and fingerprint(ids.view(3, 4)) in prints


def test_the_parts_of_the_documentation_never_overlap_and_suffice():
    parts = {s: set(read_text(TextConfig(split=s), "x").documents) for s in ("train", "validation", "test")}
    assert not (parts["train"] & parts["test"] or parts["train"] & parts["validation"])
    assert min(sum(map(len, p)) for p in (parts["train"], parts["test"])) > 120_000


def test_a_mix_draws_equal_parts(text):
    mix = TextConfig("mix", mix=(text, TextConfig("docs")))
    tokens = draw(mix, samples=5)
    assert tokens.ids.shape == (5, 8) and tokens.source == "file/text.txt+docs/train"
    assert torch.equal(tokens.ids[:3], draw(text).ids)


def test_jsonl_and_parquet_give_the_column_that_is_named(tmp_path):
    rows = ["first document", "second document"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": r, "n": 1}) for r in rows))
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "n": [1, 2]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        config = TextConfig("file", path=str(tmp_path / name), text_column="body")
        assert read_text(config, "x").documents == tuple(rows)
        wrong = TextConfig("file", path=str(tmp_path / name), text_column="boddy")
        with pytest.raises(UserError, match="did you mean 'body'"):
            read_text(wrong, "x")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.txt", b"", "is empty"),
        ("s.txt", b" \n ", "is empty"),
        ("b.txt", b"ab\0cd", "binary"),
        ("u.txt", b"ab\xff\xfecd", "UTF-8"),
        ("x.doc", b"abc", "expected one of .txt"),
        ("j.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("p.parquet", b"PAR1 and nonsense", "no Parquet file"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_text(TextConfig("file", path=str(path)), "data.calibration")
    assert "\n" not in str(error.value) and "data.calibration" in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path, text):
    with pytest.raises(UserError, match=r"did you mean 'text.txt'"):
        check_source(TextConfig("file", path=str(tmp_path / "txet.txt")), "data.x")
    with pytest.raises(UserError, match="is a folder"):
        check_source(TextConfig("file", path=str(tmp_path)), "data.x")


def test_too_little_text_says_how_much_there_is(text):
    with pytest.raises(UserError, match="100 tokens, 12 windows of 8; 13 were asked for: ask for 12 or fewer"):
        draw(text, samples=13)


def test_a_window_longer_than_the_models_positions_is_refused(text):
    with pytest.raises(UserError, match="longer than the model's 4 positions"):
        draw(text, limit=4)


def test_a_tokenizer_without_bos_is_refused_when_bos_is_asked_for(text, monkeypatch):
    monkeypatch.setattr(Bytes, "bos_token_id", None)
    with pytest.raises(UserError, match="no BOS"):
        draw(text, bos=True)


@pytest.mark.parametrize(
    "config", [TextConfig("wikitext2"), TextConfig("c4", variant="new"), TextConfig("ptb", variant="old")]
)
def test_a_hub_that_cannot_be_reached_gets_one_line(config):
    with pytest.raises(UserError, match="connect to the hub once") as error:
        read_text(config, "data.evaluation")
    assert "\n" not in str(error.value)
