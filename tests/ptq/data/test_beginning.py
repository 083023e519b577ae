"""What begins a window: what the tokenizer itself puts before a text, its BOS, or nothing; and the result says which."""

import json

import pytest
import transformers
from tokenizers import processors

from ptq.config.building import recipe_from
from ptq.config.schema import TextConfig
from ptq.data.sampling import Draw, beginning
from ptq.errors import UserError
from ptq.run.experiment import run
from ptq.testing import BOS, EOS, byte_tokenizer


def adding(template: str):
    """The byte tokenizer that puts special tokens around a text when it encodes it, as LLaMA's does."""
    tokenizer = byte_tokenizer()
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "begin"),
    [("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", []), ("</s> <s> $A", [EOS, BOS])],
)
def test_auto_is_what_the_tokenizer_puts_before_a_text(template, begin):
    tokenizer = adding(template)
    assert beginning(tokenizer, "auto", "x") == begin
    assert beginning(tokenizer, True, "x") == [BOS] and beginning(tokenizer, False, "x") == []
    tokens = Draw(TextConfig(), 2, 32, bos="auto").tokens(tokenizer)
    encoded = tokenizer(tokenizer.decode(tokens.text_ids[1])).input_ids
    assert tokens.ids[1].tolist() == encoded[:32] and tokens.ids.shape == (2, 32)
    assert tokens.begin == tuple(tokenizer.convert_ids_to_tokens(begin))


def test_windows_that_hold_nothing_but_their_beginning_and_tokenizers_that_do_not_tell_are_refused():
    with pytest.raises(UserError, match="x: windows of 2 tokens, of which 2 begin each"):
        Draw(TextConfig(), 2, 2, bos="auto", field="x").tokens(adding("</s> <s> $A"))

    class Other:
        """Encodes a text otherwise where it adds something."""

        def __call__(self, text, add_special_tokens=True):
            return transformers.BatchEncoding({"input_ids": [7, 8] if add_special_tokens else [9]})

    with pytest.raises(UserError, match="x: bos is auto, but .* use true or false"):
        beginning(Other(), "auto", "x")


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """A tiny run of a LLaMA whose tokenizer puts a BOS before every text."""
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    adding("<s> $A").save_pretrained(folder)

    def made(**bos):
        return recipe_from(
            {
                "name": "bos", "model": {"path": str(folder)}, "steps": {"rtn": {}},
                "scheme": {"weight": {"bits": 8, "granularity": "channel"}},
                "calibration": {"samples": 2, "length": 64, **bos}, "evaluation": {"windows": 2, "length": 64, **bos},
                "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
            }
        )  # fmt: skip

    return made


def test_a_run_does_what_the_tokenizer_does_unless_it_is_told_otherwise_and_says_it(recipe, capsys):
    prints, said = [], []
    for options in ({}, {"bos": True}, {"bos": False}):
        found = json.loads((run(recipe(**options)) / "metrics.json").read_text())
        prints.append(found["evaluation_fingerprint"])
        said.append(found["bos"])
    assert prints[0] == prints[1] != prints[2]
    assert said == [{"calibration": "<s>", "evaluation": "<s>"}] * 2 + [{"calibration": "", "evaluation": ""}]
    shown = capsys.readouterr().out
    assert shown.count("docs/test, begun by <s>") == 2 and shown.count("docs/test, no BOS") == 1
    assert [json.loads(json.dumps(recipe().as_dict()))[part]["bos"] for part in ("calibration", "evaluation")] == [
        "auto"
    ] * 2


@pytest.mark.parametrize("bos", ["yes", 1, None, "true"])
def test_anything_else_is_refused(recipe, bos):
    with pytest.raises(UserError, match=r"^(calibration|evaluation).bos: "):
        recipe(bos=bos)
