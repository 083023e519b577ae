"""Texts and token windows: what is drawn, and what is refused."""

import json
import os
import pathlib
import random
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.config.schema import DataConfig, TextConfig
from ptq.data import sources
from ptq.data.sampling import Draw, check_length, fingerprint
from ptq.data.sources import check_disjoint, check_source, read_text
from ptq.errors import UserError
from ptq.testing import byte_tokenizer


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id = 256

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return SimpleNamespace(input_ids=list(text.encode()))

    def convert_ids_to_tokens(self, ids):
        return [{256: "<s>"}[i] for i in ids]


def draw(config, samples=3, length=8, sampling="contiguous", seed=0, bos=False, least=None):
    return Draw(config, samples, length, sampling, seed, bos, "data.x", least).tokens(Bytes())


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
    assert min(sum(map(len, p)) for p in (parts["train"], parts["test"])) > 80_000


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
        ("q.parquet", b"PAR1 and nonsensePAR1", "no Parquet file"),
        ("late.txt", b"a" * 70_000 + b"\0", "binary"),
        ("half.jsonl", b'{"text": "\\ud800"}', "line 1 holds half a surrogate"),
        ("number.jsonl", b'{"text": 3}', "line 1 has no text"),
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


def test_fewer_windows_will_do_down_to_the_least(text):
    assert torch.equal(draw(text, samples=13, least=5).ids, draw(text, samples=12).ids)
    assert torch.equal(draw(text, samples=7, least=5).ids, draw(text, samples=7).ids)
    with pytest.raises(UserError, match="12 windows of 8; 13 were asked for"):
        draw(text, samples=20, least=13)


def test_too_little_text_says_how_much_there_is(text):
    with pytest.raises(UserError, match="100 tokens, 12 windows of 8; 13 were asked for: ask for 12 or fewer"):
        draw(text, samples=13)


def test_a_window_longer_than_the_models_positions_is_refused():
    check_length(8, 8, "data.x")
    check_length(8, None, "data.x")
    with pytest.raises(UserError, match="data.x: windows of 8 tokens are longer than the model's 4 positions"):
        check_length(8, 4, "data.x")


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


@pytest.mark.parametrize(
    ("name", "content"),
    [("b.txt", b"\0"), ("u.txt", b"\xff"), ("cut.txt", "a\u00e9".encode()[:-1]), ("p.parquet", b"PAR1")],
)
def test_the_dry_run_sees_what_the_beginning_of_a_file_tells(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="data.x.path"):
        check_source(TextConfig("file", path=str(tmp_path / name)), "data.x")


def test_a_character_that_straddles_the_probed_bytes_is_no_mistake(tmp_path):
    content = "a" * (sources.PROBE_BYTES - 1) + "\u00e9"
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    config = TextConfig("file", path=str(tmp_path / "a.txt"))
    assert check_source(config, "x") is None and read_text(config, "x").documents == (content,)


def test_a_path_that_the_system_refuses_gets_one_line(tmp_path):
    for path in (tmp_path / ("a" * 300 + ".txt"), "~nobody-of-this-name/a.txt"):
        with pytest.raises(UserError, match=r"^data\.x\.path: ") as error:
            check_source(TextConfig("file", path=str(path)), "data.x")
        assert "\n" not in str(error.value)


def test_line_separators_inside_a_json_string_end_no_line(tmp_path):
    rows = ("one\u2028still one", "two\x85still two")
    content = "\r\n".join(json.dumps({"text": r}, ensure_ascii=False) for r in rows)
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    assert read_text(TextConfig("file", path=str(tmp_path / "a.jsonl")), "x").documents == rows


def test_a_byte_order_mark_and_capitals_in_the_suffix_are_no_part_of_the_text(tmp_path):
    (tmp_path / "A.TXT").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(TextConfig("file", path=str(tmp_path / "A.TXT")), "x").documents == ("hello",)


@settings(deadline=None)
@given(st.integers(2, 40), st.booleans())
def test_contiguous_windows_hold_the_text_once_and_in_order(length, bos):
    config = TextConfig("docs", split="validation")
    whole = list(read_text(config, "x").joined.encode())
    ids = draw(config, None, length, bos=bos).ids[:, int(bos) :]
    held = ids.numel()
    assert ids.flatten().tolist() == whole[:held] and len(whole) - held < ids.shape[1] and ids.dtype == torch.int64


def test_random_sampling_leaves_the_global_generator_alone(text):
    before = torch.get_rng_state()
    first, second = (draw(text, sampling="random", seed=s).fingerprint for s in (1, 2))
    assert first != second and torch.equal(before, torch.get_rng_state())


def test_a_text_shorter_than_one_window_is_not_told_to_ask_for_none(text):
    with pytest.raises(UserError, match="0 windows of 200; 1 were asked for: shorten the windows"):
        draw(text, samples=None, length=200)


@pytest.fixture
def hub(monkeypatch):
    """Rows that stand in for the hub's; returns the places and splits that were asked for."""
    asked = []
    long = ["".join(chr(33 + (i * 7 + j) % 90) for j in range(20 + i % 30)) for i in range(2000)]

    def rows(place, split, field):
        asked.append((place, split))
        return ["short", *long]

    monkeypatch.setattr(sources, "_load_rows", rows)
    return SimpleNamespace(asked=asked, long=long)


def test_old_c4_takes_256_slices_each_inside_one_document(hub):
    config = TextConfig("c4", variant="old", split="test")
    tokens = draw(config, samples=None, length=30)
    assert tokens.ids.shape == (256, 30) and tokens.source == "c4/old/validation"
    assert all(any(bytes(row.tolist()).decode() in d for d in hub.long) for row in tokens.ids)
    assert tokens.fingerprint == draw(config, None, 30).fingerprint != draw(config, None, 30, seed=1).fingerprint
    with pytest.raises(UserError, match="no document longer than 60 tokens: shorten"):
        draw(config, 3, 60)


@pytest.mark.parametrize("seed", [0, 3])
def test_old_c4_makes_the_draws_of_the_published_protocol(hub, seed):
    random.seed(seed)
    documents = ["short", *hub.long]
    expected = []
    for _ in range(300):
        while len(document := documents[random.randint(0, len(documents) - 1)]) <= 45:
            pass
        start = random.randint(0, len(document) - 45 - 1)
        expected.append(document[start : start + 45])
    ids = draw(TextConfig("c4", variant="old", split="test"), 300, 45, "contiguous", seed).ids
    assert [bytes(row.tolist()).decode() for row in ids] == expected


def test_one_long_document_is_drawn_again_and_again(monkeypatch):
    monkeypatch.setattr(sources, "_load_rows", lambda place, split, field: ["short", "x" * 40])
    assert draw(TextConfig("c4", variant="old"), 20, 30).ids.shape == (20, 30)


def test_the_parts_of_the_pile_are_disjoint_though_it_has_a_validation_part_only(hub):
    parts = {s: read_text(TextConfig("pile", split=s), "x") for s in ("train", "validation", "test")}
    assert [part for _, part in hub.asked] == ["validation"] * 3
    assert {p.name for p in parts.values()} == {f"pile/validation/{s}" for s in parts}
    documents = [set(p.documents) for p in parts.values()]
    assert set.union(*documents) == {"short", *hub.long} and sum(map(len, documents)) == len({"short", *hub.long})
    assert len(documents[0]) > len(documents[2]) > len(documents[1]) > 0


@pytest.mark.parametrize(
    ("calibration", "evaluation", "part"),
    [
        (TextConfig("c4", "new", "validation"), TextConfig("c4", "old", "test"), "c4/validation"),
        (TextConfig("ptb", "old", "test"), TextConfig("ptb", "new", "validation"), "ptb/validation"),
        (TextConfig("mix", mix=(TextConfig(), TextConfig("wikitext2", split="test"))), TextConfig("wikitext2", split="test"), "wikitext2/test"),
        (TextConfig("pile", split="test"), TextConfig("pile", split="test"), "pile/validation/test"),
        (TextConfig("docs", split="test"), TextConfig("docs", split="test"), "docs/test"),
    ],
)  # fmt: skip
def test_calibrating_on_what_is_evaluated_is_refused(calibration, evaluation, part):
    with pytest.raises(UserError, match=f"split: reads {part}, which data.evaluation.split evaluates on"):
        check_disjoint(DataConfig(calibration, evaluation))


def test_disjoint_parts_and_the_own_files_of_a_user_are_not_refused(text):
    pile = DataConfig(TextConfig("pile"), TextConfig("pile", split="test"))
    ptb = DataConfig(TextConfig("ptb", "old", "validation"), TextConfig("ptb", "new", "test"))
    for data in (pile, ptb, DataConfig(), DataConfig(text, text)):
        assert check_disjoint(data) is None


def test_new_c4_joins_1100_documents_and_takes_256_windows_of_them(hub):
    config = TextConfig("c4", variant="new", split="test")
    text = read_text(config, "x")
    assert text.joined == " ".join(["short", *hub.long[:1099]]) and hub.asked[0][1] == "validation"
    tokens = draw(config, samples=None, length=50)
    assert tokens.ids.shape == (256, 50) and bytes(tokens.ids.flatten().tolist()) == text.joined.encode()[: 256 * 50]


@pytest.mark.parametrize(("variant", "split", "joiner"), [("old", "validation", "\n\n"), ("new", "test", " ")])
def test_ptb_is_evaluated_on_the_part_that_its_variant_names(hub, variant, split, joiner):
    text = read_text(TextConfig("ptb", variant=variant, split="test"), "x")
    assert text.name == f"ptb/{variant}/{split}" and hub.asked[0][1] == split and text.joiner == joiner
    place = hub.asked[0][0]
    # The data set's own branch holds a script, which datasets 4 and later refuse.
    assert place.revision == "refs/convert/parquet" and place.files[split].endswith(f"/{split}/0000.parquet")


def test_a_data_set_that_is_a_script_gets_one_line(monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported\nbut found x.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="scripts are no longer supported") as error:
        read_text(TextConfig("pile"), "data.x")
    assert "\n" not in str(error.value)


def test_a_dead_endpoint_is_told_at_once_and_the_cache_still_serves(tmp_path):
    import datasets

    folder = tmp_path / "datasets" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / ("b" * 40)
    code = (
        "import time; from ptq.config.schema import DataConfig, TextConfig; from ptq.data.sources import read_text\n"
        "from ptq.errors import UserError\n"
        "start = time.monotonic()\n"
        "try: print(read_text(TextConfig('wikitext2', split='test'), 'x').documents)\n"
        "except UserError as error: print(error)\n"
        "print(time.monotonic() - start < 15)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}

    def run():
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    line, quick = run()
    assert "connect to the hub once" in line and quick == "True"
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": ["kept", "text"]})
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "wikitext-test.arrow")) as writer:
        writer.write_table(rows.data.table)
        writer.finalize()
    info = {
        "builder_name": "parquet", "dataset_name": "wikitext", "config_name": "wikitext-2-raw-v1",
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "features": {"text": {"dtype": "string", "_type": "Value"}},
        "splits": {"test": {"name": "test", "num_bytes": 10, "num_examples": 2, "dataset_name": "wikitext"}},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert run() == ["('kept', 'text')", "True"]


def test_every_window_knows_the_document_that_its_middle_stands_in(tmp_path):
    documents = ["a" * 50, "b" * 10, "c" * 70]
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config, tokenizer = TextConfig(source="file", path=str(path)), byte_tokenizer()
    for sampling in ("contiguous", "random"):
        drawn = Draw(config, 12, 11, sampling).tokens(tokenizer)
        middles = [tokenizer.decode(row)[5] for row in drawn.ids]
        told = {(m, d) for m, d in zip(middles, drawn.documents, strict=True) if m != "\n"}
        assert len(told) == len({m for m, _ in told}) == len({d for _, d in told}) > 1
    path.write_text(json.dumps({"text": "a" * 200}))
    one = Draw(config, 4, 11).tokens(tokenizer)
    assert one.documents is None
