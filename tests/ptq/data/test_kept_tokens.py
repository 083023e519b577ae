"""Windows out of the store are those that the text gives, and a text is tokenized once."""

import shutil

import pytest
import torch
import transformers

from ptq.config.building import recipe_from
from ptq.config.schema import ModelConfig, TextConfig
from ptq.data.kept_tokens import KIND, load_tokens, save_tokens
from ptq.data.sampling import Draw
from ptq.data.sources import read_text
from ptq.files.store import Store
from ptq.models.shared import Shared
from ptq.run.experiment import run
from ptq.testing import byte_tokenizer

DRAWS = {
    "contiguous": Draw(TextConfig(split="validation"), 3, 40, "contiguous", 0, False, "data.x"),
    "random, with a beginning": Draw(TextConfig(split="validation"), 3, 40, "random", 7, True, "data.x"),
    "all there are": Draw(TextConfig(split="validation"), None, 500, "contiguous", 0, "auto", "data.x"),
    "a mix": Draw(
        TextConfig("mix", mix=(TextConfig(split="train"), TextConfig(split="validation"))),
        5, 40, "random", 1, False, "data.x",
    ),
}  # fmt: skip


def kept(model, draw, store):
    """Draws as a process of its own would: what another has drawn it finds in the store only."""
    return Shared().tokens(ModelConfig(str(model)), draw, Store(store))


def refused(*args, **kwargs):
    raise AssertionError("a text was tokenized again")


@pytest.mark.parametrize("case", DRAWS)
def test_windows_out_of_the_store_are_those_of_the_text_and_need_no_tokenizer(tmp_path, tiny_llama, case, monkeypatch):
    draw = DRAWS[case]
    first = kept(tiny_llama, draw, tmp_path)
    monkeypatch.setattr("ptq.models.shared.load_tokenizer", refused)
    again = kept(tiny_llama, draw, tmp_path)
    plain = draw.tokens(byte_tokenizer())
    for tokens in (first, again):
        assert torch.equal(tokens.ids, plain.ids)
        assert (tokens.fingerprint, tokens.source, tokens.begin) == (plain.fingerprint, plain.source, plain.begin)
        assert tokens.documents == first.documents


def test_another_text_tokenizer_or_option_has_windows_of_its_own(tmp_path, tiny_llama):
    model, path = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_llama, model)
    path.write_text("abcdefgh" * 40)
    draw = Draw(TextConfig("file", path=str(path)), 2, 16, "contiguous", 0, False, "data.x")
    before = kept(model, draw, tmp_path / "store")
    path.write_text("hgfedcba" * 40)
    changed = kept(model, draw, tmp_path / "store")
    assert torch.equal(changed.ids, before.ids.flip(1))
    shorter = kept(model, Draw(draw.text, 2, 8, "contiguous", 0, False, "data.x"), tmp_path / "store")
    assert torch.equal(shorter.ids, changed.ids[:1, :8].expand(2, -1))
    other = transformers.AutoTokenizer.from_pretrained(model)
    other.add_tokens(["hgfedcba"])
    other.save_pretrained(model)
    merged = kept(model, draw, tmp_path / "store")
    assert merged.ids.unique().numel() == 1 and len(before.ids.unique()) == 8


def test_damaged_windows_are_drawn_again_and_said(tmp_path, tiny_llama, capsys):
    draw = DRAWS["contiguous"]
    before = kept(tiny_llama, draw, tmp_path)
    [path] = (tmp_path / KIND).glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(kept(tiny_llama, draw, tmp_path).ids, before.ids)
    assert "an entry of tokens" in capsys.readouterr().err


def test_what_is_no_file_of_windows_is_refused(tmp_path):
    tokens = DRAWS["contiguous"].tokens(byte_tokenizer())
    save_tokens(tokens, tmp_path / "tokens")
    assert torch.equal(load_tokens(tmp_path / "tokens").ids, tokens.ids)
    for content in (b"", b"{}", (tmp_path / "tokens").read_bytes()[:200]):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="no windows"):
            load_tokens(tmp_path / "other")


def test_a_run_tokenizes_each_of_its_texts_once_its_checks_included(tmp_path, tiny_llama, monkeypatch):
    lengths = []
    encode = transformers.PreTrainedTokenizerBase.__call__

    def counted(self, text, *args, **kwargs):
        lengths.append(len(text))
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", counted)
    parts = {"calibration": {"source": "docs", "split": "train"}, "evaluation": {"source": "docs", "split": "test"}}
    recipe = {
        "name": "once", "model": {"path": str(tiny_llama)}, "data": parts, "steps": {"rtn": {}},
        "scheme": {"weight": {"bits": 8}}, "calibration": {"samples": 2, "length": 32},
        "evaluation": {"windows": 2, "length": 32}, "outputs": str(tmp_path / "o"), "store": str(tmp_path / "s"),
    }  # fmt: skip
    run(recipe_from(recipe))
    whole = [len(read_text(TextConfig(split=split), "x").joined) for split in ("train", "test")]
    assert sorted(n for n in lengths if n >= min(whole)) == sorted(whole)
    run(recipe_from({**recipe, "scheme": {"weight": {"bits": 4}}}))
    assert sorted(n for n in lengths if n >= min(whole)) == sorted(whole)
