"""Bad input through the command line: one line on stderr, status 2, nothing left behind; and a run that is stopped is taken up."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
import yaml

from ptq.cli.app import main
from ptq.testing import byte_tokenizer, tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[3]
STATIC = {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Folders of a random OPT and a random LLaMA with a byte tokenizer."""
    folders = {}
    for kind in ("opt", "llama"):
        folders[kind] = tmp_path_factory.mktemp("models") / kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(folders[kind])
        byte_tokenizer().save_pretrained(folders[kind])
    return folders


class Desk:
    """A folder to work in, with a recipe that works."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.folder, self.recipe = folder, folder / "good.yaml"
        content = {
            "model": {"path": str(model)},
            "calibration": {"samples": 4, "length": 64},
            "evaluation": {"windows": 4, "length": 64, "resamples": 100},
            "scheme": STATIC,
            "steps": {"rtn": {}},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
        self.recipe.write_text(yaml.safe_dump(content))

    def files(self) -> set[pathlib.Path]:
        """Everything below the folder but finished work: whole entries of the store, and runs that the same command takes up.

        A kind of entries of which none was kept, such as a digest of files too young to be trusted, is an empty folder there.
        """
        finished = {path.parent for path in (self.folder / "store").rglob("manifest.json")}
        finished |= {path.parent for path in (self.folder / "outputs").rglob("resume")}
        inside = {path for folder in finished for path in (folder, folder.parent, *folder.rglob("*"))}
        inside |= {path for path in (self.folder / "store").glob("*") if path.is_dir() and not any(path.iterdir())}
        return set(self.folder.rglob("*")) - inside - {self.folder / "store"}

    def line(self, capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "run", config: str = "") -> str:
        """Returns the one line that a command is refused with; checks that it leaves nothing."""
        before = self.files()
        assert main([command, "--config", config or str(self.recipe), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
        assert self.files() == before
        return error

    def command(self, *arguments: str, command: str = "run") -> list[str]:
        """Returns the command line of a process of its own."""
        return [sys.executable, "-m", "ptq", command, "--config", str(self.recipe), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of such a process."""
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def desk(tmp_path, models) -> Desk:
    """A desk with the random OPT."""
    return Desk(tmp_path, models["opt"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evalution.windows=2"], "evalution: no such key (value {'windows': 2}); did you mean 'evaluation'"),
        (["scheme.weight.bits=9"], "scheme.weight.bits: 9 is not valid: expected"),
        (["scheme.weight.granularity=chanel"], "did you mean 'channel'"),
        (["scheme.weight.granularity=group", "scheme.weight.group_size=100"], "100 does not divide the"),
        (["model.path=/no/such/model"], "/no/such/model is not there"),
        (["calibration.statistics=/no/such/file"], "calibration.statistics: /no/such/file is not there"),
        (["evaluation.windows=1000000"], "1000000 were asked for: ask for"),
        (["calibration.samples=1000000"], "1000000 were asked for: ask for"),
        (["evaluation.length=257"], "evaluation.length: 257 is longer than the model's 256 positions: use 256 or less"),
        (["calibration.length=257"], "calibration.length: 257 is longer than the model's 256 positions"),
        (["outputs=/proc/no"], "outputs: /proc/no"),
        (["store=/dev/null/x"], "store: /dev/null/x cannot be written to"),
    ],
)
def test_a_wrong_value_gets_one_line_and_leaves_nothing(desk, capsys, arguments, said):
    assert said in desk.line(capsys, *arguments)
    if arguments != ["evaluation.windows=1000000"]:  # statistics read no evaluation text
        assert said in desk.line(capsys, *arguments, command="stats")


def test_a_misspelt_config_name_gets_one_line_with_the_nearest(desk, capsys):
    assert "did you mean 'smollm2-135m_w8a8'?" in desk.line(capsys, config="smollm2-135m_w8a9")
    assert "neither a shipped recipe nor a file" in desk.line(capsys, config=str(desk.folder / "god.yaml"))


def copied(desk: Desk, model: pathlib.Path) -> pathlib.Path:
    """Copies a model into the desk's folder."""
    folder = desk.folder / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_without_config_and_truncated_weights_get_one_line(desk, models, capsys):
    folder = copied(desk, models["opt"])
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert "is truncated or damaged" in desk.line(capsys, f"model.path={folder}")
    (folder / "config.json").unlink()
    assert "has no config.json: expected a folder saved by save_pretrained" in desk.line(capsys, f"model.path={folder}")
    empty = desk.folder / "x.gguf"
    empty.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    assert "truncated or damaged" in desk.line(capsys, f"model.path={empty}")
    empty.write_bytes(b"GGUF")
    assert "is truncated (4 bytes)" in desk.line(capsys, f"model.path={empty}")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is not there"), (b"", "is empty"), (b"a\0b", "is a binary file"), (b"short", "tokens")],
)
def test_a_text_that_cannot_be_used_gets_one_line(desk, capsys, content, said):
    path = desk.folder / "text.txt"
    if content is not None:
        path.write_bytes(content)
    for part in ("evaluation", "calibration"):
        line = desk.line(capsys, f"data.{part}={{source: file, path: {path}}}")
        assert said in line and f"data.{part}" in line


def test_statistics_of_another_model_and_damaged_ones_get_one_line(desk, models, tmp_path, capsys):
    path = tmp_path / "s.safetensors"
    assert main(["stats", "--config", str(desk.recipe), "--output", str(path)]) == 0
    given = f"calibration.statistics={path}"
    other = desk.line(capsys, given, f"model.path={models['llama']}")
    assert "has no model.layers.0" in other and "take them from this model" in other
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 100, 3, 0):
        path.write_bytes(whole[:cut])
        assert "is cut short or damaged" in desk.line(capsys, given)
    path.write_bytes((models["opt"] / "model.safetensors").read_bytes())
    assert "holds no statistics" in desk.line(capsys, given)


def limit_files() -> None:
    """Lets this process write 50 kB a file: the system refuses more as a full disk does, with an error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_disk_that_fills_up_gets_one_line_and_the_old_file_stays_whole(desk):
    output = desk.folder / "s.safetensors"
    arguments = desk.command("--output", str(output), command="stats")
    assert subprocess.run(arguments, env=desk.environment, capture_output=True, timeout=120).returncode == 0
    old, before = output.read_bytes(), desk.files()
    assert len(old) > 50_000
    for more in ([], ["calibration.samples=5"]):  # statistics out of the store, and taken anew
        done = subprocess.run(
            [*arguments, *more],
            env=desk.environment,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=limit_files,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "the disk is full" in done.stderr and "the old file is whole" in done.stderr
        assert output.read_bytes() == old and desk.files() == before


WAITING = '''
"""A step that waits, so that a run can be interrupted while it is at work."""

import pathlib
import time
from dataclasses import dataclass

from ptq.steps import StepPlan, Transform


@dataclass(frozen=True)
class Options:
    """Attributes:
    go: the file to wait for.
    """

    go: str


class Step(Transform):
    def plan(self, context):
        go = pathlib.Path(self.options.go)
        go.with_name("waiting").touch()
        while not go.exists():
            time.sleep(0.01)
        return StepPlan()

    def apply(self, block, plan, context):
        pass
'''


def test_a_run_that_is_interrupted_says_so_and_is_taken_up_where_it_stopped(desk):
    go = desk.folder.parent / f"{desk.folder.name}-go" / "go"
    go.parent.mkdir()
    (go.parent / "waiting_step.py").write_text(WAITING)
    environment = {
        **desk.environment,
        "PYTHONPATH": os.pathsep.join([str(go.parent), desk.environment.get("PYTHONPATH", "")]),
    }
    steps = ["~steps.rtn", "+steps.wait._target_=waiting_step.Step", f"+steps.wait.go={go}", "+steps.rtn={}"]
    arguments = desk.command("evaluation.windows=8", "evaluation.length=128", *steps)
    # Where the tests run in the background of a shell, SIGINT is ignored, and whatever they start inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 120
        while not go.with_name("waiting").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error == "stopped: interrupted; what was finished is kept, and the same command takes it up\n"
    assert not list(desk.folder.rglob("metrics.json")) and not list((desk.folder / "store").rglob(".*"))
    go.touch()
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "read from the store" in done.stdout
    [result] = desk.folder.rglob("metrics.json")
    seconds = json.loads(result.read_text())["seconds"]
    assert "quantize" in seconds and "baseline" not in seconds and "calibration" not in seconds
