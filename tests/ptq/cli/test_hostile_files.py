"""A fuzz of what a command line reads besides the recipe: the model's files, GGUF files, statistics, and the words themselves."""

import contextlib
import json
import pathlib
import shutil
import struct
import time

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ptq.cli.app import main
from ptq.testing import byte_tokenizer, tiny_config

MOST_SECONDS = 10
FUZZ = settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a random LLaMA and its byte tokenizer, a recipe for it, and statistics of it."""
    folder = tmp_path_factory.mktemp("hostile")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    content = {
        "model": {"path": str(folder / "model")},
        "calibration": {"samples": 2, "length": 16},
        "evaluation": {"windows": 2, "length": 16, "resamples": 100},
        "scheme": {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}},
        "steps": {"rtn": {}},
        "outputs": str(folder / "outputs"),
        "store": str(folder / "store"),
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    assert main(["stats", "--config", str(folder / "r.yaml"), "--output", str(folder / "s.safetensors")]) == 0
    return folder


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line that a command is refused with, or nothing where it works; in time, whatever it is given."""
    capsys.readouterr()
    began = time.monotonic()
    status = main(list(arguments))
    took, line = time.monotonic() - began, capsys.readouterr().err
    assert status in {0, 2} and took < MOST_SECONDS, (arguments, status, took)
    assert (line.startswith("error: ") and line.count("\n") == 1 and len(line) < 1000) if status else line == "", line
    return line


def dry(capsys: pytest.CaptureFixture[str], folder: pathlib.Path, model: pathlib.Path, *words: str) -> str:
    """Returns what a dry run of the recipe says of another model folder or file."""
    return answered(capsys, "run", "--config", str(folder / "r.yaml"), f"model.path={model}", *words, "--dry-run")


KEYS = st.sampled_from(
    [*sorted(tiny_config("llama").to_dict()), "auto_map", "quantization_config", "num_local_experts"]
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 3, 255, 10**6, 2**31, 2**40, 2**62, 2**70, -(2**70), 1e308, float("nan"), float("inf"), 0.5]
)
TEXTS = st.sampled_from(
    ["", "owner/repo", "../../x", "gpt2", "float8_e4m3fn", "os.system", "a" * 5000, "\x00", "é\u2028"]
) | st.text(max_size=5)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(TEXTS, PLAIN, max_size=3) | st.just([[[]]] * 3)


@FUZZ
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=2))
@example({"num_hidden_layers": 999})
@example({"hidden_size": 2**40, "num_attention_heads": 1})
@example({"layer_types": ["full_attention"] * 10**5})
def test_whatever_a_models_config_says(place, tmp_path, capsys, changes):
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(place / "model", model)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    dry(capsys, place, model)


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
CHANGES = st.tuples(st.integers(0, 20_000), st.binary(max_size=12), st.booleans())


def harmed(data: bytes, place: int, piece: bytes, cut: bool) -> bytes:
    """Some bytes in the place of others, or the file cut there."""
    place %= max(1, len(data))
    return data[:place] + piece if cut else data[:place] + piece + data[place + len(piece) :]


@FUZZ
@given(st.sampled_from(FILES), CHANGES)
def test_whatever_is_damaged_in_a_models_folder(place, tmp_path, capsys, name, change):
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(place / "model", model)
    path = model / name
    path.write_bytes(harmed(path.read_bytes(), *change))
    dry(capsys, place, model)


@FUZZ
@given(st.dictionaries(TEXTS, PLAIN | st.just("model.safetensors"), max_size=3), VALUES)
def test_whatever_an_index_of_weights_names(place, tmp_path, capsys, names, metadata):
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(place / "model", model)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    content = json.dumps({"weight_map": names, "metadata": metadata})
    (model / "model.safetensors.index.json").write_text(content)
    assert dry(capsys, place, model)


def text_of(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


SCALARS = st.sampled_from([(4, "<I"), (5, "<i"), (6, "<f"), (10, "<Q"), (12, "<d")])
ENTRIES = st.sampled_from([
    "general.architecture", "general.alignment", "llama.block_count", "llama.embedding_length", "llama.context_length",
    "llama.attention.head_count", "llama.feed_forward_length", "tokenizer.ggml.model", "tokenizer.ggml.tokens", "x",
])  # fmt: skip


@st.composite
def gguf_files(draw) -> bytes:
    """Heads of GGUF files with entries of any kind and counts that may lie."""
    entries = []
    for key in draw(st.lists(ENTRIES, max_size=4)):
        if draw(st.booleans()):
            kind, form = draw(SCALARS)
            value = draw(st.integers(0, 2**31 - 1))
            entries.append(text_of(key) + struct.pack("<I", kind) + struct.pack(form, value))
        else:
            value = draw(st.sampled_from(["llama", "gpt2", "mamba", "", "é"]))
            entries.append(text_of(key) + struct.pack("<I", 8) + text_of(value))
    count = draw(st.sampled_from([len(entries), 0, 2**40]))
    tensors = draw(st.sampled_from([0, 1, 2**40]))
    tensor = (
        text_of("token_embd.weight")
        + struct.pack("<I", draw(st.sampled_from([1, 2, 2**31])))
        + draw(st.binary(max_size=40))
    )
    return (
        b"GGUF" + struct.pack("<IQQ", draw(st.sampled_from([3, 2, 1, 99])), tensors, count) + b"".join(entries) + tensor
    )


@FUZZ
@given(gguf_files() | st.binary(max_size=60).map(lambda data: b"GGUF" + data))
def test_whatever_a_gguf_file_holds(place, tmp_path, capsys, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert dry(capsys, place, path)
    answered(capsys, "inspect", str(path))


@FUZZ
@given(CHANGES)
def test_whatever_is_damaged_in_a_file_of_statistics(place, tmp_path, capsys, change):
    path = tmp_path / "s.safetensors"
    whole = (place / "s.safetensors").read_bytes()
    path.write_bytes(harmed(whole, *change))
    line = dry(capsys, place, place / "model", f"calibration.statistics={path}")
    assert line or path.read_bytes() == whole
    answered(capsys, "inspect", str(path))


WORDS = st.sampled_from([
    "run", "stats", "footprint", "list", "show", "store", "inspect", "status", "export", "data", "bench", "compare", "--config", "demo",
    "--dry-run", "--cfg", "full", "job", "ls", "verify", "gc", "--max-size", "1GB", "--store", "/nowhere", "/dev/null", "--run", "--format",
    "gguf", "steps.gptq", "scheme.weight", "recipes", "--completion", "bash", "--version", "--help", "-h", "--", "-", "", "=", "x=", "~x", "+",
])  # fmt: skip


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A folder where the demo's model has been read once: its vocabulary takes seconds the first time, which is no hanging."""
    folder = tmp_path_factory.mktemp("used")
    with contextlib.chdir(folder):
        assert main(["run", "--dry-run"]) == 0
    return folder


@FUZZ
@given(st.lists(WORDS | st.text(max_size=6), max_size=5))
def test_whatever_words_are_typed(used, monkeypatch, capsys, words):
    monkeypatch.chdir(used)
    if words[:1] == ["run"] or words[:1] == ["stats"]:
        words = [*words, "--dry-run"]
    if words[:1] == ["bench"]:
        words = [*words, "--config", "nowhere"]
    answered(capsys, *words)
