"""Sweeps: all points checked first, one table, nothing computed twice, and one point's failure is its own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

from ptq.cli import catalog
from ptq.cli.app import main
from ptq.cli.compose.hydra_edge import compose_points
from ptq.errors import UserError
from ptq.run.experiment import run_recipe
from ptq.sweep.points import read_sweep
from ptq.sweep.status import RUNNING, Status, status_of, write_status

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def runs(monkeypatch):
    """Counts the runs that begin."""
    begun = []

    def counted(recipe, *arguments, **named):
        begun.append(recipe)
        return run_recipe(recipe, *arguments, **named)

    monkeypatch.setattr("ptq.sweep.work.run_recipe", counted)
    return begun


def test_points_are_the_product_and_each_row_has_the_figures_of_its_run(swept):
    rows = swept.table(swept.main)
    assert [(r["steps.smooth.alpha"], r["scheme.weight.bits"], r["status"]) for r in rows] == [
        ("0.3", "4", "done"), ("0.3", "8", "done"), ("0.3", "9", "refused"),
        ("0.5", "4", "done"), ("0.5", "8", "done"), ("0.5", "9", "refused"),
    ]  # fmt: skip
    for row in rows:
        if row["status"] == "done":
            metrics = json.loads((pathlib.Path(row["folder"]) / "metrics.json").read_text())
            assert float(row["quantized_perplexity"]) == metrics["quantized_perplexity"]
            assert row["identity"] == metrics["identity"]
            size = metrics["size"]
            assert (
                float(row["model_bits"]) == 8 * size["after_bytes"] / size["parameters"] > float(row["bits_per_weight"])
            )
    assert "scheme.weight.bits: 9 is not valid" in rows[2]["line"]
    parquet = pyarrow.parquet.read_table(swept.main / "points.parquet").to_pylist()
    assert [row["kl_mean"] for row in parquet if row["status"] == "done"] == [
        float(r["kl_mean"]) for r in rows if r["kl_mean"]
    ]


def test_the_same_sweep_again_runs_nothing_however_it_is_spelled(swept, runs):
    before = swept.table(swept.main)
    assert swept.run("++steps.smooth.alpha=0.3,0.5", "scheme.weight.bits=4,8,9", "evaluation.windows=4") == 1
    assert runs == []
    assert len(swept.folders) == 1
    assert swept.table(swept.main) == before


def test_a_point_that_another_sweep_or_run_has_done_is_not_run_again(swept, runs, capsys):
    assert swept.run("steps.smooth.alpha=0.5,0.6", "scheme.weight.bits=8") == 0
    assert [recipe.steps["smooth"]["alpha"] for recipe in runs] == [0.6]
    assert "2 points, 1 finished before" in capsys.readouterr().out


def test_every_point_of_a_sweep_shares_one_load_and_one_baseline(sweeps, monkeypatch, capsys):
    from ptq.models import shared as module
    from ptq.sweep.work import shared_of_process

    loads = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda *arguments: (loads.append(1), load(*arguments))[1])
    shared_of_process.cache_clear()
    assert sweeps.run("steps.smooth.alpha=0.2,0.3,0.4") == 0
    assert len(loads) == 1
    logs = [path.read_text() for path in sorted((sweeps.folders[0] / "points").glob("*.log"))]
    assert ["baseline: evaluated before" in log for log in logs] == [False, True, True]
    assert "perplexity" not in capsys.readouterr().out.split("sweep small")[0]


def test_ranges_choices_and_globs_are_values_as_hydra_has_them():
    words = ["scheme=glob(w4a16_g*)", "scheme.weight.bits=range(3,5)", "steps.smooth.alpha=choice(0.3,0.5)"]
    points = compose_points(catalog.locate("smollm2-135m_w8a8"), words)
    assert [point.refused for point in points] == [""] * 8
    assert [(p.recipe.scheme.weight.group_size, p.recipe.scheme.weight.bits, p.recipe.steps["smooth"]["alpha"]) for p in points] == [
        (group, bits, alpha) for group in (32, 64) for bits in (3, 4) for alpha in (0.3, 0.5)
    ]  # fmt: skip


def test_zip_goes_side_by_side(sweeps, capsys):
    assert sweeps.run("--zip", "--dry-run", "steps.smooth.alpha=0.3,0.5", "scheme.weight.bits=4,8") == 0
    out = capsys.readouterr().out
    assert "point 2 steps.smooth.alpha=0.5 scheme.weight.bits=8: ok" in out and "2 points, 0 refused" in out
    assert not (sweeps.folder / "outputs").exists()


def test_a_point_that_fails_is_in_the_table_with_its_line_and_is_taken_up_by_resume(sweeps, monkeypatch, capsys):
    def failing(recipe, *arguments, **named):
        if recipe.scheme.weight.bits == 8:
            raise RuntimeError("no luck\nat all")
        return run_recipe(recipe, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("ptq.sweep.work.run_recipe", failing)
        assert sweeps.run("scheme.weight.bits=8,4,3") == 1
    rows = sweeps.table()
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert rows[0]["line"].startswith("RuntimeError: no luck at all: see ")
    assert "no luck" in pathlib.Path(rows[0]["line"].rpartition("see ")[2]).read_text()
    begun = []
    monkeypatch.setattr("ptq.sweep.work.run_recipe", lambda r, *a, **n: (begun.append(r), run_recipe(r, *a, **n))[1])
    assert main(["sweep", "resume", str(sweeps.folders[0]), "--launcher", "here"]) == 0
    assert [recipe.scheme.weight.bits for recipe in begun] == [8]
    assert [row["status"] for row in sweeps.table()] == ["done"] * 3
    capsys.readouterr()
    assert main(["sweep", "show", str(sweeps.folders[0])]) == 0
    assert capsys.readouterr().out.count("done") == 3


def test_ctrl_c_ends_the_sweep_and_leaves_a_table_that_says_so(sweeps, monkeypatch, capsys):
    def interrupted(recipe, *arguments, **named):
        if recipe.scheme.weight.bits == 8:
            raise KeyboardInterrupt
        return run_recipe(recipe, *arguments, **named)

    monkeypatch.setattr("ptq.sweep.work.run_recipe", interrupted)
    assert sweeps.run("scheme.weight.bits=4,8,3") == 130
    assert [row["status"] for row in sweeps.table()] == ["done", "interrupted", "waiting"]
    assert "what was finished is kept" in capsys.readouterr().err


def test_a_point_whose_process_has_gone_is_interrupted_not_running(swept):
    sweep = read_sweep(swept.main)
    before = status_of(sweep.folder, sweep.points[0])
    write_status(sweep.folder, 1, Status(RUNNING, before.folder))
    try:
        assert status_of(sweep.folder, sweep.points[0]).kind == "interrupted"
    finally:
        write_status(sweep.folder, 1, before)


def test_an_option_that_changes_nothing_is_said(sweeps, capsys):
    assert sweeps.run("--dry-run", "steps.smooth.alpha=0.5", "outputs=a,b") == 0
    out = capsys.readouterr().out
    assert "point 1 outputs=a: ok" in out
    assert "refused: outputs=b: the same experiment as point 1: it has no effect here, leave it out" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zip", "steps.smooth.alpha=0.3,0.5", "scheme.weight.bits=2,3,4"], "(evaluation.seed has 2, steps.smooth.alpha has 2, scheme.weight.bits has 3)"),
        (["scheme.weight.bitz=3,4"], "scheme.weight.bitz"),
        (["--jobs", "0"], "--jobs: 0 is too small"),
        (["--jobs", "2"], "--jobs: 2 with --launcher here"),
        (["launcher.partition=gpu"], "launcher.partition: no such option of here"),
        (["evaluation.windows=interval(1,2)"], "an interval has no end"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_command_line_is_one_line(sweeps, words, said, capsys):
    assert sweeps.run("evaluation.seed=0,1", *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (sweeps.folder / "outputs").exists()


def test_a_sweep_over_nothing_has_one_point_side_by_side_too(sweeps, capsys):
    for words in ([], ["--zip"], ["--zip", "scheme.weight.bits=8"]):
        assert sweeps.run("--dry-run", *words) == 0
        assert "1 points, 0 refused" in capsys.readouterr().out


def test_options_of_sweeps_need_m(sweeps, capsys):
    assert main(["run", "--config", str(sweeps.recipe), "--jobs", "2"]) == 2
    assert "--jobs: is for sweeps: add -m" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_sweep_that_is_none_or_damaged_is_told_in_one_line(tmp_path, damage):
    if damage != "missing":
        (tmp_path / "sweep.json").write_text("{" if damage == "cut" else "[]")
    with pytest.raises(UserError, match="holds no sweep" if damage == "missing" else "damaged"):
        read_sweep(tmp_path)


def begin(sweeps, *words):
    """Starts a sweep in another process, in a process group of its own."""
    command = [sys.executable, "-m", "ptq", "run", "--config", str(sweeps.recipe), "-m", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def holders(sweeps):
    """Processes that hold the lease of a point's run, by the lease."""
    found = {}
    for path in (sweeps.folder / "outputs" / "small").glob("*.lease"):
        try:
            found[path] = json.loads(path.read_text())["pid"]
        except (OSError, ValueError):
            continue
    return found


def test_killed_points_and_a_killed_launcher_leave_a_sweep_that_ends_as_an_undisturbed_one(sweeps, swept):
    """Points are killed one after another, then the launcher, then all is resumed."""
    words = ["steps.smooth.alpha=0.3,0.5", "scheme.weight.bits=4,8,9", "--jobs", "1", "--threads", "1"]
    process = begin(sweeps, *words)
    deadline, killed = time.monotonic() + 120, set()
    while process.poll() is None and time.monotonic() < deadline and len(killed) < 2:
        for path, pid in holders(sweeps).items():
            if path not in killed and pid != process.pid:
                os.kill(pid, signal.SIGKILL)
                killed.add(path)
        time.sleep(0.01)
    assert len(killed) == 2
    while process.poll() is None and not set(holders(sweeps)) - killed and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    statuses = [status_of(sweeps.folders[0], point).kind for point in read_sweep(sweeps.folders[0]).points]
    assert statuses.count("failed") == 2 and statuses.count("refused") == 2
    assert main(["sweep", "resume", str(sweeps.folders[0]), "--launcher", "here", "--threads", "1"]) == 1
    places = ("folder", "line", "identity")
    assert [{k: v for k, v in r.items() if k not in places} for r in sweeps.table()] == [
        {k: v for k, v in r.items() if k not in places} for r in swept.table(swept.main)
    ]
