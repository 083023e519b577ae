"""Launchers: the same sweep gives equal figures whoever runs its points; what is not installed or there is told in a line."""

import importlib.util
import sys

import pytest

from ptq.errors import UserError
from ptq.sweep.launchers import base
from ptq.sweep.launchers.base import LAUNCHERS, Ended, Task, build_launcher, shares_this_machine
from ptq.sweep.resources import jobs_that_fit, room_of, threads_for, threads_set

FIGURES = ("quantized_perplexity", "kl_mean", "difference_low", "top1_agreement", "model_bits")
WORDS = {
    "processes": ["--jobs", "2"],
    "slurm": ["--jobs", "2", "launcher.cluster=local", "launcher.timeout_min=10"],
    "ray": ["--jobs", "2"],
}


@pytest.mark.parametrize("launcher", list(WORDS))
def test_every_launcher_gives_the_figures_of_points_run_here(sweeps, swept, launcher, monkeypatch, capsys):
    if LAUNCHERS[launcher].extra and importlib.util.find_spec({"slurm": "submitit"}.get(launcher, launcher)) is None:
        pytest.skip(f"the extra {LAUNCHERS[launcher].extra} is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*WORDS[launcher], "--threads", "1", "steps.smooth.alpha=0.3,0.5", "scheme.weight.bits=8"]
    with threads_set(1):
        assert sweeps.run(*words, launcher=launcher) == 0
    got = [[row[name] for name in FIGURES] for row in sweeps.table()]
    expected = [[r[name] for name in FIGURES] for r in swept.table(swept.main) if r["scheme.weight.bits"] == "8"]
    assert got == expected
    assert "2 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("slrum", {}, "--launcher: 'slrum' is no launcher; did you mean 'slurm'?"),
        ("processes", {"partition": "gpu"}, "launcher.partition: no such option of processes"),
        ("slurm", {"cluster": "locl"}, "launcher.cluster: 'locl' is neither slurm nor local"),
        ("slurm", {"partition": "gpu"}, "this machine has no srun"),
        ("slurm", {"cluster": "local", "partitoin": "gpu"}, "launcher.partitoin: no such parameter of Slurm jobs; did you mean 'partition'?"),
        ("ray", {"adress": "x"}, "launcher.adress: no such option of ray; did you mean 'address'?"),
        ("ray", {"num_gpus": "two"}, "launcher.num_gpus: 'two' is no number of GPUs"),
    ],
)  # fmt: skip
def test_what_a_launcher_does_not_know_is_one_line(tmp_path, name, options, said, monkeypatch):
    monkeypatch.setenv("PATH", "")
    if name in {"slurm", "ray"}:
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[name])
    with pytest.raises(UserError) as error:
        build_launcher(name, 1, 1, options, str(tmp_path))
    assert said in str(error.value)


@pytest.mark.parametrize(("name", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_library_that_is_not_installed_names_the_extra(tmp_path, name, library, monkeypatch):
    monkeypatch.delitem(sys.modules, base.LAUNCHERS[name].module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UserError,
        match=rf"--launcher: '{name}' needs {library}, which is not installed: pip install 'ptq-framework\[{name}\]'",
    ):
        build_launcher(name, 1, 1, {}, str(tmp_path))


@pytest.mark.parametrize(
    ("launcher", "library", "said"),
    [
        ("ray", "ray", "--launcher: 'ray' needs ray, which is not installed: pip install 'ptq-framework[ray]'"),
        ("slurm", "submitit", "--launcher: 'slurm' needs submitit, which is not installed: pip install 'ptq-framework[slurm]'"),
        ("slurm", None, "--launcher: 'slurm', but this machine has no srun"),
    ],
)  # fmt: skip
def test_no_ray_and_no_slurm_are_one_line_of_the_command_before_any_work(
    sweeps, launcher, library, said, monkeypatch, capsys
):
    if library is None:
        pytest.importorskip("submitit")
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.delitem(sys.modules, base.LAUNCHERS[launcher].module, raising=False)
        monkeypatch.setitem(sys.modules, library, None)
    assert sweeps.run("steps.smooth.alpha=0.3,0.5", launcher=launcher) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (sweeps.folder / "outputs").exists()


def test_a_slurm_job_that_is_preempted_is_submitted_again_with_its_point(sweeps):
    pytest.importorskip("submitit")
    from ptq.sweep.launchers.slurm import PointWork

    assert sweeps.run("scheme.weight.bits=4,3") == 0
    work, [folder] = PointWork(), sweeps.folders
    again = work.checkpoint(str(folder), 2, 1, True)
    assert again.args == (str(folder), 2, 1, True)
    assert again.result() == "done" and sweeps.table()[1]["status"] == "done"


def test_a_process_that_is_killed_ends_its_own_point_only(sweeps, monkeypatch):
    from ptq.sweep.launchers.processes import Processes

    launcher = Processes(2, 1)
    # No sweep is there: every point fails in its process, by an exception, and the launcher goes on.
    ended = [e for e in launcher.run(Task(str(sweeps.folder), 1), [1, 2, 3]) if e is not None]
    assert sorted(e.number for e in ended) == [1, 2, 3]
    assert all("holds no sweep" in e.problem for e in ended)
    assert isinstance(ended[0], Ended)


@pytest.mark.parametrize(
    ("name", "options", "shared"),
    [
        ("processes", {}, True), ("here", {}, False), ("slurm", {"partition": "gpu"}, False), ("slurm", {"cluster": "local"}, True),
        ("ray", {}, True), ("ray", {"address": "auto"}, False),
    ],
)  # fmt: skip
def test_memory_is_divided_where_points_share_this_machine(name, options, shared):
    assert shares_this_machine(name, options) == shared


def test_threads_and_memory_are_divided(swept, monkeypatch):
    from ptq.sweep.points import read_sweep

    with threads_set(4):
        assert [threads_for(n) for n in (1, 2, 3, 8)] == [4, 2, 1, 1]
    recipes = [p.recipe for p in read_sweep(swept.main).points if p.recipe is not None]
    assert jobs_that_fit(1, recipes) == (1, "")
    monkeypatch.setattr("ptq.sweep.resources.memory_of", lambda recipe: 3 << 30)
    monkeypatch.setattr("ptq.sweep.resources.memory_need", lambda recipe: 1 << 30)
    assert jobs_that_fit(8, recipes) == (3, "memory: some 1.0 GiB a point, 3.0 GiB there: 3 at once instead of 8")
    assert [room_of(n, recipes) for n in (1, 2, 3)] == [1 << 30, 1 << 28, 0]
    monkeypatch.setattr("ptq.sweep.resources.memory_need", lambda recipe: 4 << 30)
    assert jobs_that_fit(2, recipes)[0] == 1
    monkeypatch.setattr("ptq.sweep.resources.memory_need", lambda recipe: None)
    assert jobs_that_fit(2, recipes) == (2, "")
    assert room_of(2, recipes) == 0


def test_a_process_whose_memory_has_grown_keeps_the_model_that_it_has_loaded(tmp_path, monkeypatch):
    def grow(folder, number, threads, force, room):
        import os
        import pathlib
        import sys
        import time

        hoard = sys.__dict__.setdefault("hoard", [])
        hoard.append(b"1" * 400_000_000 if hoard else b"")
        with (pathlib.Path(folder) / "pids").open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.1)  # loky looks once a second
        return ""

    monkeypatch.setattr("ptq.sweep.launchers.processes.work_on", grow)
    launcher = build_launcher("processes", 1, 1, {}, str(tmp_path))
    ended = [e for e in launcher.run(Task(str(tmp_path), 1, False), [1, 2, 3]) if e is not None]
    assert [e.problem for e in ended] == ["", "", ""]
    assert len(set((tmp_path / "pids").read_text().split())) == 1
