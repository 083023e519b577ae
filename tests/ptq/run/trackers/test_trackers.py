"""Trackers are told of a run, and never hurt it: one that raises, one that hangs, one that is not installed."""

import importlib.util
import json
import pathlib
import struct
import sys
import threading
import time
import types

import pytest
import yaml

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.run.trackers import base
from ptq.run.trackers.base import TRACKERS, TrackedRun, flat, numbers, tracking


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, run):
        self.run, self.told, self.ended = run, {}, None

    def figures(self, values):
        self.told.update(values)

    def end(self, files, problem):
        self.ended = [path.name for path in files], problem


def module(monkeypatch, name, build):
    """Puts a module with `build` in the place of a tracker's, its library installed."""
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, types.SimpleNamespace(build=build))
    find = importlib.util.find_spec
    library = TRACKERS[name].library
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: object() if n == library else find(n, *a))


@pytest.fixture
def recorded(monkeypatch):
    """The runs that the tracker in W&B's place was told of."""
    runs = []
    module(monkeypatch, "wandb", lambda run: (runs.append(Recorder(run)), runs[-1])[1])
    return runs


@pytest.fixture
def run(tmp_path, tiny_llama):
    """The function that runs a small recipe by the command line."""
    content = {
        "model": {"path": str(tiny_llama)},
        "calibration": {"samples": 2, "length": 32},
        "evaluation": {"windows": 2, "length": 32, "resamples": 200},
        "scheme": {"weight": {"bits": 4}},
        "steps": {"rtn": {}},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return lambda *words: main(["run", "--config", str(path), *words])


def test_a_tracker_is_told_of_options_phases_figures_and_files(run, recorded, tmp_path):
    assert run("trackers=[wandb]") == 0
    [tracker] = recorded
    [path] = (tmp_path / "outputs").rglob("metrics.json")
    metrics = json.loads(path.read_text())
    assert tracker.run.options["scheme.weight.bits"] == 4 and tracker.run.name == "small"
    assert tracker.told["quantized_perplexity"] == metrics["quantized_perplexity"]
    assert tracker.told["size.bits_per_weight"] == metrics["size"]["bits_per_weight"]
    assert {"seconds.load", "seconds.quantize", "seconds.evaluate"} <= set(tracker.told)
    names, problem = tracker.ended
    assert {"metrics.json", "layers.csv", "recipe.yaml"} <= set(names) and problem == ""


def test_no_result_depends_on_trackers(run, recorded, capsys):
    assert run() == 0
    assert run("trackers=[wandb]") == 0
    assert "finished before" in capsys.readouterr().out
    assert recorded == []


def test_a_run_that_fails_says_so_to_its_tracker(tmp_path):
    runs = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        module(patch, "trackio", lambda about: (runs.append(Recorder(about)), runs[-1])[1])
        with tracking(["trackio"], TrackedRun("n", "k", tmp_path, tmp_path, {}), print):
            raise RuntimeError("no\nluck")
    assert runs[0].ended == ([], "no luck")


def test_a_tracker_that_raises_is_said_once_and_the_run_has_its_result(run, monkeypatch, capsys, tmp_path):
    class Broken(Recorder):
        def figures(self, values):
            raise SystemExit("the server is away")

    module(monkeypatch, "wandb", Broken)
    assert run("trackers=[wandb]") == 0
    out = capsys.readouterr().out
    assert out.count("tracker wandb: SystemExit: the server is away: told nothing more of this run") == 1
    assert len(list((tmp_path / "outputs").rglob("metrics.json"))) == 1


def test_a_tracker_that_hangs_at_its_close_is_left_behind(monkeypatch, tmp_path):
    forever = threading.Event()

    class Hanging(Recorder):
        def end(self, files, problem):
            forever.wait()

    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.3)
    module(monkeypatch, "wandb", Hanging)
    said = []
    begun = time.monotonic()
    with tracking(["wandb"], TrackedRun("n", "k", tmp_path, tmp_path, {}), said.append) as tracked:
        tracked.figures({"x": 1.0})
    assert time.monotonic() - begun < 5
    assert len(said) == 1 and said[0].startswith("tracker wandb: has not ended in 0 s and is left behind")
    forever.set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trackers=[mlfow]"], "trackers: 'mlfow' is not valid: expected one of mlflow, tensorboard, wandb, trackio; did you mean 'mlflow'?"),
        (["trackers=[trackio]"], "trackers: 'trackio' needs trackio, which is not installed: pip install 'ptq-framework[trackio]'"),
    ],
)  # fmt: skip
def test_a_tracker_that_is_not_there_is_one_line_before_the_work(run, words, said, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "trackio" else find(n, *a))
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_flat_names_and_the_numbers_of_a_result():
    assert flat({"a": {"b": 1, "c": [2, {"d": None}]}}) == {"a.b": 1, "a.c.0": 2, "a.c.1.d": None}
    assert numbers({"a": 1, "b": True, "c": "x", "d": {"e": 2.5}, "f": [1], "window_losses": {"g": [1]}}) == {
        "a": 1.0,
        "d.e": 2.5,
    }


def about(folder):
    (folder / "metrics.json").write_text("{}")
    return TrackedRun("recipe", "0123", folder, folder / "outputs", {"scheme.weight.bits": 4})


def told(name, folder):
    """Tells the real tracker of a run."""
    said = []
    with tracking([name], about(folder), said.append) as tracked:
        tracked.figures({"seconds.load": 1.5})
        tracked.figures({"quantized_perplexity": 7.25})
    assert said == []


def test_mlflow_keeps_a_run_in_its_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from ptq.run.trackers.to_mlflow import local_store

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(base, "CLOSE_SECONDS", 300.0)
    monkeypatch.chdir(tmp_path)
    told("mlflow", tmp_path)
    client = mlflow.MlflowClient(local_store(tmp_path / "outputs"))
    [kept] = client.search_runs([client.get_experiment_by_name("recipe").experiment_id])
    assert kept.data.metrics == {"seconds.load": 1.5, "quantized_perplexity": 7.25}
    assert kept.data.params == {"scheme.weight.bits": "4"}
    assert kept.info.status == "FINISHED" and kept.info.run_name == "0123"
    assert [file.path for file in client.list_artifacts(kept.info.run_id)] == ["metrics.json"]
    assert not (tmp_path / "mlruns").exists()


def test_tensorboard_reads_the_events_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(base, "CLOSE_SECONDS", 300.0)
    told("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"seconds/load", "quantized_perplexity"}
    assert events.Scalars("quantized_perplexity")[0].value == 7.25


def of_wandb(path):
    """Yields the records of a file that W&B keeps offline: a log in blocks of 32 KiB (LevelDB's), after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := -at % 2**15) and left < 7:
            at += left
            continue
        size, part = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if part in {1, 4}:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield getattr(record, record.WhichOneof("record_type"))
            whole = b""


def test_wandb_keeps_a_run_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(base, "CLOSE_SECONDS", 300.0)
    told("wandb", tmp_path)
    [path] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = {}
    for record in of_wandb(path):
        records.setdefault(type(record).__name__, []).append(record)
    run = records["RunRecord"][0]
    assert (run.project, run.display_name) == ("recipe", "0123")
    options = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert options["scheme.weight.bits"] == 4
    figures = {item.key or item.nested_key[0]: item.value_json for r in records["HistoryRecord"] for item in r.item}
    assert (figures["seconds.load"], figures["quantized_perplexity"]) == ("1.5", "7.25")
    assert records["RunExitRecord"][0].exit_code == 0
    assert (path.parent / "files" / "metrics.json").read_text() == "{}"


def test_trackio_keeps_a_run_in_its_database(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="the extra trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(base, "CLOSE_SECONDS", 300.0)
    told("trackio", tmp_path)
    [run] = trackio.Api().runs("recipe")
    assert run.name == "0123" and run.config["scheme.weight.bits"] == 4
    rows = SQLiteStorage.get_logs("recipe", "0123")
    assert [row.get("seconds.load") for row in rows] == [1.5, None]
    assert rows[-1]["quantized_perplexity"] == 7.25


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_with_an_init_are_given_project_name_options_and_figures(tmp_path, monkeypatch, name):
    calls = []

    class Run:
        def __init__(self):
            self.summary = {}

        def log(self, values):
            calls.append(("log", values))

        def save(self, path, **options):
            calls.append(("save", pathlib.Path(path).name))

        def finish(self, **options):
            calls.append(("finish", options))

    def init(**options):
        calls.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    monkeypatch.delitem(sys.modules, TRACKERS[name].module, raising=False)
    told(name, tmp_path)
    first = calls[0][1]
    assert (first["project"], first["name"], first["config"]) == ("recipe", "0123", {"scheme.weight.bits": 4})
    assert [each for each in calls if each[0] == "log"] == [
        ("log", {"seconds.load": 1.5}),
        ("log", {"quantized_perplexity": 7.25}),
    ]
    assert calls[-1][0] == "finish"
    monkeypatch.delitem(sys.modules, TRACKERS[name].module)


def test_trackers_are_off_unless_asked_for():
    assert recipe_from({"name": "x", "model": {"path": "y"}}).trackers == ()
