"""Hostile and odd input through the command line: one line each, status 2, no traceback, no hang; and a fuzz of it all."""

import json
import pathlib
import shutil
import struct
import subprocess
import sys
import time

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ptq.cli import reference
from ptq.cli.app import main
from ptq.testing import byte_tokenizer, tiny_config

MOST_SECONDS = 10
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of a random LLaMA with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Desk:
    """A folder with a copy of a model, and a recipe for it."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.folder, self.model, self.recipe = folder, folder / "model", folder / "r.yaml"
        shutil.copytree(model, self.model)
        content = {
            "model": {"path": str(self.model)},
            "calibration": {"samples": 2, "length": 16},
            "evaluation": {"windows": 2, "length": 16, "resamples": 100},
            "scheme": {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}},
            "steps": {"rtn": {}},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
        self.recipe.write_text(yaml.safe_dump(content))

    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "run") -> str:
        """Returns the one line that a dry run is refused with, in time."""
        began = time.monotonic()
        dry = ["--dry-run"] if command == "run" else []
        assert main([command, "--config", str(self.recipe), *dry, *arguments]) == 2
        assert time.monotonic() - began < MOST_SECONDS
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 1000
        return line

    def config(self, **changes: object) -> None:
        """Changes the model's config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def desk(tmp_path, llama) -> Desk:
    """A desk with the random LLaMA."""
    return Desk(tmp_path, llama)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**6}, "asks for 1000000 blocks"),
        ({"num_hidden_layers": 2**31}, "asks for 2147483648 blocks"),
        ({"num_hidden_layers": 900}, "modules, far more than its weights are for"),
        ({"num_hidden_layers": 5}, "has no weights of model.layers.4"),
        ({"_attn_implementation": "owner/repo"}, "which is code on the hub"),
        ({"attn_implementation": "owner/repo"}, "which is code on the hub"),
        ({"_experts_implementation": "owner/repo"}, "which is code on the hub"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": 2**40}, "by config.json"),
        ({"vocab_size": 2**62}, "no model of its config.json can be built"),
        ({"intermediate_size": 48}, "[128, 320] in model.safetensors and [128, 48] by config.json"),
        ({"model_type": "../../x"}, "does not recognize"),
        ({"hidden_act": "owner/repo"}, "can be built"),
    ],
)
def test_a_config_of_no_model_gets_one_line_at_once(desk, capsys, changes, said):
    desk.config(**changes)
    assert said in desk.refused(capsys)


CHAIN = {f"x{i}": f"${{x{i + 1}}}${{x{i + 1}}}" for i in range(40)} | {"x40": "a"}
BOMBS = {
    "texts": {"name": "${x0}", **CHAIN},
    "lists": {"name": "${x0}", **{f"x{i}": [f"${{x{i + 1}}}"] * 2 for i in range(40)}, "x40": "a"},
    "relative": {"a": {f"x{i}": f"${{.x{i + 1}}}${{.x{i + 1}}}" for i in range(40)} | {"x40": "a"}, "name": "${a.x0}"},
    "by a resolver": {"name": "${oc.select:x0}", **CHAIN},
    "in a group": {"model": {"path": "${x0}"}, **CHAIN},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_interpolations_that_double_forty_times_are_refused_at_once(desk, capsys, bomb):
    content = yaml.safe_load(desk.recipe.read_text()) | BOMBS[bomb]
    desk.recipe.write_text(yaml.safe_dump(content))
    assert "write the values instead" in desk.refused(capsys)


def test_an_interpolation_whose_name_holds_another_is_refused_but_for_the_environment(desk, capsys):
    assert "write the name out" in desk.refused(capsys, "name='${${calibration.samples}.x}'")
    assert "write the name out" in desk.refused(capsys, "name='${oc.select:${name}}'")
    assert "write the name out" in desk.refused(capsys, "name='${a.${name}}'")
    assert "asks for an environment variable" in desk.refused(capsys, "name='${oc.env:${x}}'", "+x=HOME")


def test_interpolations_typed_in_overrides_are_bounded_too_and_a_ring_is_told(desk, capsys):
    typed = [f"+{key}='{value}'" for key, value in CHAIN.items()]
    assert "write the values instead" in desk.refused(capsys, *typed)
    assert "write the values instead" in desk.refused(capsys, *typed, "execution='${x0}'")
    assert "Recursive interpolation" in desk.refused(capsys, "+a='${b}'", "+b='${a}'")


def test_deeply_nested_files_of_a_model_get_one_line(desk, capsys, llama):
    (desk.model / "config.json").write_text(DEEP)
    assert "nested too deep" in desk.refused(capsys)
    shutil.copy(llama / "config.json", desk.model / "config.json")
    whole = (desk.model / "model.safetensors").read_bytes()
    header = (b'{"__metadata__":' + DEEP.encode() + b"}").ljust(8)
    (desk.model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "nested too deep" in desk.refused(capsys)
    (desk.model / "model.safetensors").unlink()
    index = desk.model / "model.safetensors.index.json"
    index.write_text(DEEP)
    assert "nested too deep" in desk.refused(capsys)
    (desk.folder / "outside.safetensors").write_bytes(whole)
    for name in ("../outside.safetensors", str(desk.folder / "outside.safetensors"), "..", "a\0b"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert "which is no safetensors file of this folder" in desk.refused(capsys)


def gguf(entries: list[tuple[bytes, int, bytes]], tensors: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    """The bytes of a GGUF file with these metadata: key, type, value."""
    many = counts or (0, len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, *many)
    return (
        head + b"".join(struct.pack("<Q", len(k)) + k + struct.pack("<I", kind) + v for k, kind, v in entries) + tensors
    )


TENSOR = struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31) + b"\0" * 64
ALIGNED = (b"general.alignment", 4)


@pytest.mark.parametrize(
    "content",
    [
        gguf([(*ALIGNED, struct.pack("<I", 0))]),
        gguf([(*ALIGNED, struct.pack("<I", 7))]),
        gguf([(b"x", 9, struct.pack("<IQ", 9, 1) * 5000)]),
        gguf([(b"x", 9, struct.pack("<IQ", 8, 2**60))]),
        gguf([(b"x", 9, struct.pack("<IQ", 0, 2**63))]),
        gguf([(b"x", 99, b"")]),
        gguf([], b"", (2**40, 2**40)),
        gguf([], TENSOR, (1, 0)),
        b"GGUF" + b"\xff" * 100,
    ],
)
def test_a_gguf_file_that_lies_gets_one_line(desk, capsys, content):
    path = desk.folder / "x.gguf"
    path.write_bytes(content)
    assert "truncated" in desk.refused(capsys, f"model.path={path}")


def test_a_gguf_file_of_2_to_31_blocks_gets_one_line(desk, capsys):
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    entries = [(b"general.architecture", 8, text(b"llama")), (b"llama.block_count", 4, struct.pack("<I", 2**31))]
    (desk.folder / "x.gguf").write_bytes(gguf(entries))
    desk.refused(capsys, f"model.path={desk.folder / 'x.gguf'}")


def edited(path: pathlib.Path, change) -> None:
    """Rewrites a file of statistics with other entries and the metadata that it had."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata=metadata)


def swap(tensors, metadata):
    for part in ("min", "max"):
        one, other = (f"model.layers.0.self_attn.{p}_proj/weight/in_{part}" for p in "kv")
        tensors[one], tensors[other] = tensors[other], tensors[one]


def fill(value):
    def change(tensors, metadata):
        tensors["model.layers.0.mlp.up_proj/input/max"][0] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors.pop("model.layers.0.mlp.up_proj/input/max"),
        lambda tensors, metadata: tensors.update({"model.layers.0.mlp.up_proj/input/more": torch.ones(3)}),
        lambda tensors, metadata: tensors.update({"x": torch.ones(3)}),
        swap, fill(float("nan")), fill(float("inf")), fill(-1e30), fill(1e30),
        lambda tensors, metadata: tensors["model.layers.0.mlp.up_proj/input/count"].fill_(-1),
        lambda tensors, metadata: metadata.update(provenance=DEEP),
        lambda tensors, metadata: metadata.update(provenance="{}"),
        lambda tensors, metadata: metadata.pop("digest"),
    ],
)  # fmt: skip
def test_a_file_of_statistics_that_was_changed_gets_one_line_before_the_work(statistics, desk, capsys, change):
    path = desk.folder / "s.safetensors"
    shutil.copy(statistics, path)
    edited(path, change)
    assert "calibration.statistics" in desk.refused(capsys, f"calibration.statistics={path}")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, llama) -> pathlib.Path:
    """Statistics of the random LLaMA, as a file."""
    desk = Desk(tmp_path_factory.mktemp("statistics"), llama)
    assert main(["stats", "--config", str(desk.recipe), "--output", str(desk.folder / "s.safetensors")]) == 0
    return desk.folder / "s.safetensors"


def test_statistics_that_nothing_reads_are_refused(statistics, desk, capsys):
    line = desk.refused(capsys, f"calibration.statistics={statistics}", "scheme.input=null")
    assert "changes nothing: neither a step nor a static range of the scheme reads statistics" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calibration.sampling=random", f"calibration.seed={2**70}"], "calibration.seed"),
        (["evaluation.resamples=1000000000"], "evaluation.resamples"),
        (["+steps.rtn._target_=3"], "steps.rtn._target_: 3 is no import path"),
        (["evaluation.windows=100000000"], "were asked for"),
        (["evaluation.length=100000"], "256 positions"),
        (["execution.prefetch=false"], "execution.prefetch: false changes nothing beside execution.weights=resident"),
        (["model.revision=main"], "model.revision: 'main' changes nothing"),
        (["scheme.weight=null", "scheme.input=null"], "scheme: quantizes nothing"),
        (["scheme.exclude=['*']"], "scheme: quantizes nothing"),
        (["scheme.overrides=[{modules: '*.q_proj', tensors: {weight: {bits: 8}}}]"], "scheme.overrides[0]: changes nothing"),
        (["+steps={smooth: {search: true, alpha: 0.7}}"], "steps.smooth.alpha: 0.7 changes nothing"),
        ([f"steps.rtn={'[' * 3000}"], "error"),
        ([f"model.path={'x' * 20000}"], "characters"),
        (["model.path=a\0b"], "error"),
        (["evaluation.windows=" + "9" * 5000], "cannot be read"),
        (["calibration.samples=-1"], "calibration.samples: -1 is too small"),
        (["execution.device=cuda:99999999999999999999"], "execution.device"),
        (["execution.device=meta"], "execution.device"),
        (["evaluation.confidence=.nan"], "evaluation.confidence"),
    ],
)  # fmt: skip
def test_an_odd_value_gets_one_line_before_the_work(desk, capsys, arguments, said):
    assert said in desk.refused(capsys, *arguments)


def test_what_needs_no_model_is_refused_before_the_machine_is_measured(desk, capsys):
    for word in (
        "data.evaluation={source: file, path: nowhere.txt}",
        "+data.evaluation.split=train",
        "scheme={weight: null, input: null}",
    ):
        assert main(["run", "--config", str(desk.recipe), word, "--dry-run"]) == 2, word
        assert capsys.readouterr().out == "", word


def test_a_reader_who_leaves_does_not_stop_a_run(desk):
    command = [sys.executable, "-m", "ptq", "run", "--config", str(desk.recipe)]
    root = pathlib.Path(__file__).resolve().parents[3]
    line = f"cd {root} && {' '.join(command)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
    assert done.returncode in {0, 141} and done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert len(list((desk.folder / "outputs").rglob("metrics.json"))) == 1


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["int", "auto", "random", "file", "/", "..", "~", "${x}", "${oc.env:HOME}", "*", "os.system", "a: b"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    sorted({n for n in reference.names() if n not in {"outputs", "store"}} | {"x", "steps.x._target_"})
)


def spelt(value) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)


FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def checked(arguments, capsys):
    began = time.monotonic()
    status = main(["run", *arguments, "--dry-run"])
    took, line = time.monotonic() - began, capsys.readouterr().err
    assert status in {0, 2} and took < MOST_SECONDS, (arguments, status, took)
    assert (line.startswith("error: ") and line.count("\n") == 1) if status else line == "", (arguments, line)


@FUZZ
@given(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=2))
def test_whatever_is_typed_is_a_recipe_or_one_line(desk, capsys, pairs):
    checked(["--config", str(desk.recipe), *(f"{name}={spelt(value)}" for name, value in pairs)], capsys)


@FUZZ
@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_whatever_a_recipe_file_holds_it_is_a_recipe_or_one_line(desk, capsys, values):
    content = yaml.safe_load(desk.recipe.read_text())
    for name, value in values.items():
        *parts, last = name.split(".")
        place = content
        for part in parts:
            place = place.setdefault(part, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[last] = value
    path = desk.folder / "fuzz.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    checked(["--config", str(path)], capsys)


@FUZZ
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_whatever_bytes_a_recipe_file_has_they_get_one_line(desk, capsys, content):
    path = desk.folder / "fuzz.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    checked(["--config", str(path)], capsys)
