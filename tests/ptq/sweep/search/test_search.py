"""Searches by the command line: trials, resuming, repeats, pruning, samplers, what is refused."""

import csv
import json
import pathlib
import sys

import pytest
import yaml

from ptq.cli.app import main
from ptq.sweep.page import command_of
from ptq.sweep.points import read_sweep
from ptq.sweep.search.definition import SAMPLERS, read_search

optuna = pytest.importorskip("optuna", reason="the extra search is not installed")

BITS = {"scheme.weight.bits": [3, 4, 6, 8]}
ALPHA = {"steps.smooth.alpha": {"low": 0.1, "high": 0.9}}


@pytest.fixture
def search(sweeps, capsys):
    """The function that runs a search of a space by the command line; returns the exit status and what was printed."""

    def run(space, *words, **content):
        path = sweeps.folder / "space.yaml"
        path.write_text(yaml.safe_dump({"space": space, **content}))
        status = main(["run", "--config", str(sweeps.recipe), "--search", str(path), "--launcher", "here", *words])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def made_up(monkeypatch):
    """Runs in no time: perplexity falls with the bits and is least at alpha 0.4; counts the runs."""
    begun = []

    def run(recipe, force=False, shared=None, lent=None):
        from ptq.run.experiment import run_folder
        from ptq.run.result import Result

        folder = run_folder(recipe)
        if force or not (folder / "metrics.json").is_file():
            begun.append(recipe)
            bits, alpha = recipe.scheme.weight.bits, recipe.steps["smooth"].get("alpha", 0.5)
            loss = 1 + 2.0**-bits + (alpha - 0.4) ** 2
            windows = recipe.evaluation.windows
            folder.mkdir(parents=True, exist_ok=True)
            losses = {"quantized": [loss + 0.01 * i for i in range(windows)], "baseline": [1 + 0.01 * i for i in range(windows)]}  # fmt: skip
            metrics = {
                "quantized_perplexity": loss, "baseline_perplexity": 1.0, "ratio": loss, "difference": loss - 1, "kl_mean": 2.0**-bits, "top1_agreement": 0.9,
                "size": {"bits_per_weight": bits, "after_bytes": bits * 125, "parameters": 1000}, "window_losses": losses,
                "evaluation_fingerprint": "e", "identity": folder.name,
            }  # fmt: skip
            (folder / "metrics.json").write_text(json.dumps(metrics))
            (folder / "layers.csv").write_text("name,output_error\n")
        return Result(folder)

    def finished(recipe, shared=None):
        from ptq.run.experiment import run_folder

        folder = run_folder(recipe)
        return folder if (folder / "metrics.json").is_file() else None

    for module in ("work", "pruning"):
        monkeypatch.setattr(f"ptq.sweep.{module}.run_recipe", run)
    for module in ("loop", "pruning"):
        monkeypatch.setattr(f"ptq.sweep.{module}.finished_before", finished)
    monkeypatch.setattr("ptq.sweep.loop.check_recipe", lambda *arguments: [])
    return begun


def rows(sweeps):
    return [{**row, "seconds": ""} for row in sweeps.table()]


def test_a_search_runs_its_trials_and_writes_the_front_that_its_points_have(sweeps, search):
    status, printed = search(BITS | ALPHA, "--trials", "3", "search.sampler=random")
    assert status == 0
    table = sweeps.table()
    assert [row["status"] for row in table] == ["done"] * 3
    assert len({row["steps.smooth.alpha"] for row in table}) == 3
    assert {row["scheme.weight.bits"] for row in table} <= {"3", "4", "6", "8"}
    front = list(csv.DictReader((sweeps.folders[-1] / "front.csv").open()))
    for row in table:
        beaten = any(
            float(f["ratio"]) <= float(row["ratio"]) and float(f["model_bits"]) <= float(row["model_bits"])
            for f in front
        )
        assert beaten
    assert "Pareto front by ratio and model_bits" in printed.out and "3 done" in printed.out
    assert main(["report", str(sweeps.folders[-1])]) == 0
    page = (sweeps.folders[-1] / "report.html").read_text()
    assert 'id="search"' in page and "3 points chosen by random, seed 0, for ratio and model_bits" in page


def test_the_same_search_again_runs_nothing_and_a_longer_one_goes_on(sweeps, search, made_up):
    assert search(BITS | ALPHA, "--trials", "5")[0] == 0
    before = rows(sweeps)
    assert search(BITS | ALPHA, "--trials", "5")[0] == 0
    assert len(made_up) == 5 and rows(sweeps) == before
    assert search(BITS | ALPHA, "--trials", "8")[0] == 0
    assert len(made_up) == 8 and rows(sweeps)[:5] == before and len(sweeps.folders) == 1


def test_points_that_other_runs_have_done_are_not_run_again(sweeps, search, made_up):
    assert sweeps.run("scheme.weight.bits=4,8") == 0
    begun = len(made_up)
    assert search(BITS, "--trials", "4")[0] == 0
    assert sorted(recipe.scheme.weight.bits for recipe in made_up[begun:]) == [3, 6]


def test_a_search_that_is_killed_ends_with_the_table_of_one_that_was_not(sweeps, search, made_up, monkeypatch, capsys):
    assert search(BITS | ALPHA, "--trials", "11")[0] == 0
    undisturbed = [{k: v for k, v in row.items() if k not in {"folder"}} for row in rows(sweeps)]
    [folder] = sweeps.folders
    for path in sorted((sweeps.folder / "outputs").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    from ptq.sweep import work

    run = work.run_recipe
    for stop_at in (3, 8):

        def killed(recipe, *arguments, at=stop_at, **named):
            if len(list((folder / "points").glob("*.json"))) == at:
                raise KeyboardInterrupt
            return run(recipe, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr("ptq.sweep.work.run_recipe", killed)
            if (folder / "sweep.json").is_file():
                assert main(["sweep", "resume", str(folder), "--launcher", "here"]) == 130
            else:
                assert search(BITS | ALPHA, "--trials", "11")[0] == 130
        # A process that is killed while it writes leaves half a line.
        with (folder / "study.jsonl").open("a") as file:
            file.write('{"op_code": 5, "wor')
    assert main(["sweep", "resume", str(folder), "--launcher", "here"]) == 0
    assert [{k: v for k, v in row.items() if k not in {"folder"}} for row in rows(sweeps)] == undisturbed


def test_a_point_that_failed_is_taken_up_and_the_study_learns_of_it(sweeps, search, made_up, monkeypatch):
    from ptq.sweep import work

    run = work.run_recipe

    def failing(recipe, *arguments, **named):
        if recipe.scheme.weight.bits == 8:
            raise RuntimeError("no luck")
        return run(recipe, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("ptq.sweep.work.run_recipe", failing)
        assert search(BITS, "--trials", "4")[0] == 1
    [folder] = sweeps.folders
    assert sorted(row["status"] for row in sweeps.table()) == ["done", "done", "done", "failed"]
    assert main(["sweep", "resume", str(folder), "--launcher", "here"]) == 0
    assert [row["status"] for row in sweeps.table()] == ["done"] * 4
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.jsonl")))
    study = optuna.load_study(study_name=None, storage=storage)
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert {t.params["scheme.weight.bits"] for t in complete} == {"3", "4", "6", "8"}
    assert {t.values[1] for t in complete} == {3.0, 4.0, 6.0, 8.0}


def test_a_space_that_is_used_up_ends_the_search_and_says_so(sweeps, search, made_up):
    status, printed = search(BITS, "--trials", "50")
    assert status == 0 and len(made_up) == 4
    assert "the space has 4 points, and all were tried" in printed.out


def test_the_sampler_goes_to_where_the_objective_is_least(sweeps, search, made_up):
    assert search(ALPHA, "--trials", "24", "search.objectives=[ratio]")[0] == 0
    alphas = [float(row["steps.smooth.alpha"]) for row in sweeps.table()]
    near = [abs(alpha - 0.4) < 0.1 for alpha in alphas]
    assert sum(near[14:]) > sum(near[:10])
    best = list(csv.DictReader((sweeps.folders[-1] / "front.csv").open()))
    assert len(best) == 1 and abs(float(best[0]["steps.smooth.alpha"]) - 0.4) < 0.03


def test_a_point_that_a_few_windows_show_to_be_worse_is_not_run_whole(sweeps, search, made_up):
    status, printed = search(BITS | ALPHA, "--trials", "10", "search.prune=2", "evaluation.windows=8")
    assert status == 0
    table = sweeps.table()
    pruned = [row for row in table if row["status"] == "pruned"]
    done = [row for row in table if row["status"] == "done"]
    assert pruned and done and len(pruned) + len(done) == 10
    whole = [recipe for recipe in made_up if recipe.evaluation.windows == 8]
    assert len(whole) == len(done)
    for row in pruned:
        number = int(row["line"].split("of point ")[1].split(",")[0])
        rival = table[number - 1]
        loss = lambda r: 2.0 ** -int(r["scheme.weight.bits"]) + (float(r["steps.smooth.alpha"]) - 0.4) ** 2  # noqa: E731
        assert loss(rival) < loss(row) and int(rival["scheme.weight.bits"]) <= int(row["scheme.weight.bits"])
        assert row["line"].startswith("after 2 windows log perplexity is ") and "model_bits no greater" in row["line"]
    assert f"{len(pruned)} pruned" in printed.out


def test_pruning_compares_the_first_windows_of_real_runs(sweeps, search):
    space = {"scheme.weight.bits": [2, 8], "steps.smooth.alpha": [0.5, 0.51]}
    words = (
        "--trials",
        "4",
        "search.prune=4",
        "search.objectives=[ratio]",
        "search.sampler=grid",
    )
    status, _ = search(space, *words, "evaluation.windows=8")
    assert status == 0
    twos = [row for row in sweeps.table() if row["scheme.weight.bits"] == "2"]
    assert sweeps.table()[0]["scheme.weight.bits"] == "8"
    assert {row["status"] for row in twos} == {"pruned"}
    assert all(row["line"].startswith("after 4 windows log perplexity is ") for row in twos)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_searches_two_objectives(sweeps, search, made_up, sampler):
    space = {**BITS, "steps.smooth.alpha": {"low": 0.1, "high": 0.9, "step": 0.1}}
    status, printed = search(space, "--trials", "6", f"search.sampler={sampler}")
    assert (status, printed.err) == (0, "")
    assert len(made_up) == 6


def test_what_is_typed_takes_an_option_out_of_the_space_or_gives_it_other_values(sweeps, search, made_up):
    assert search(BITS | ALPHA, "--trials", "6", "scheme.weight.bits=5")[0] == 0
    assert {recipe.scheme.weight.bits for recipe in made_up} == {5}
    assert search(BITS, "--trials", "6", "steps.smooth.alpha=interval(0.2,0.3)", "scheme.weight.bits=7,8")[0] == 0
    assert {recipe.scheme.weight.bits for recipe in made_up[6:]} <= {7, 8}
    assert all(0.2 <= recipe.steps["smooth"]["alpha"] <= 0.3 for recipe in made_up[6:])


def test_refused_points_are_in_the_table_and_a_space_of_them_ends_early(sweeps, search, made_up):
    status, printed = search({"scheme.weight.bits": [4, 99]}, "--trials", "5")
    assert status == 0
    assert sorted(row["status"] for row in sweeps.table()) == ["done", "refused"]
    assert "scheme.weight.bits: 99 is not valid" in printed.out
    status, printed = search({"scheme.weight.bits": list(range(100, 130))}, "--trials", "30")
    assert status == 2 and "all of the first 10 points are refused: scheme.weight.bits: 1" in printed.err


def test_options_that_make_no_difference_are_one_experiment_that_runs_once(sweeps, search, made_up):
    status, _ = search({"steps.smooth.alpha": ["0.5", "0.50", "5e-1"]}, "--trials", "9")
    assert status == 0 and len(made_up) == 1 and len(sweeps.table()) == 1


def test_two_points_at_once_in_processes(sweeps, search):
    status, printed = search(BITS | ALPHA, "--trials", "2", "--launcher", "processes", "--jobs", "2", "--threads", "1")
    assert status == 0 and "2 done" in printed.out


@pytest.mark.parametrize(
    ("space", "words", "said"),
    [
        ({"steps.smooth.links": {"low": 0, "high": 1}}, (), "space: steps.smooth.links: a range of numbers from 0 to 1, but steps.smooth"),
        ({"scheme.weight.format": {"low": 1, "high": 4}}, (), "space: scheme.weight.format: a range of numbers from 1 to 4, but scheme.weight.format: 1 is not a text"),
        ({"scheme.weight.bits": 4}, (), "scheme.weight.bits: 4 is neither a list of choices nor a range"),
        ({"scheme.weight.bitz": {"low": 2, "high": 4}}, (), "scheme.weight.bitz: no such key"),
        (BITS, ("search.sampler=tep",), "did you mean 'tpe'?"),
        (BITS, ("search.prune=4",), "search.prune: after 4 windows, but evaluation.windows is 4"),
        (BITS, ("--trials", "0"), "--trials: 0 is too small"),
        (BITS, ("--zip",), "--zip: is not for a search"),
        (BITS, ("-m",), "--m: is not for a search"),
        (BITS, ("scheme.weight.bits=4",), "every option of its space has one value"),
        (BITS, ("scheme.weight.bits=4", "steps.smooth.alpha=interval(0.9,0.2)"), "low 0.9 is not below high 0.2"),
        (BITS, ("scheme.weight.group_size=notanumber",), "scheme.weight.group_size: 'notanumber' is not a whole number"),
        (BITS, ("search.sampler",), "search.sampler: not an option: expected search.<option>=<value>"),
        (BITS, ("--cfg", "job"), "--cfg: a search has no one config"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_one_line_before_any_work(sweeps, search, space, words, said):
    status, printed = search(space, *words)
    assert status == 2
    assert said in printed.err and printed.err.count("\n") == 1
    assert not (sweeps.folder / "outputs").exists()


def test_a_choice_that_is_none_names_the_choices_once(search):
    status, printed = search(BITS, "search.sampler=foo")
    assert status == 2
    assert printed.err == f"error: search.sampler: 'foo' is not valid: expected one of {', '.join(SAMPLERS)}\n"


def test_without_optuna_the_extra_is_named(sweeps, search, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("optuna", "ptq.sweep.search.study", "ptq.sweep.search.loop"))]:  # fmt: skip
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    status, printed = search(BITS)
    assert status == 2
    assert "--search: needs optuna, which is not installed: pip install 'ptq-framework[search]'" in printed.err
    assert not (sweeps.folder / "outputs").exists()


def test_trials_without_a_search_and_damaged_searches_are_one_line(sweeps, search, made_up, capsys):
    assert main(["run", "--config", str(sweeps.recipe), "--trials", "3"]) == 2
    assert "--trials: is for searches: add --search" in capsys.readouterr().err
    assert search(BITS, "--trials", "2")[0] == 0
    (sweeps.folders[0] / "search.json").write_text('{"space": 3}')
    assert main(["sweep", "resume", str(sweeps.folders[0])]) == 2
    assert "search.json: damaged" in capsys.readouterr().err


def test_the_command_of_a_point_runs_that_point_by_itself(sweeps, search, made_up):
    assert search(BITS | ALPHA, "--trials", "2", "evaluation.windows=3")[0] == 0
    sweep, found = read_sweep(sweeps.folders[0]), read_search(sweeps.folders[0])
    words = command_of(sweep, sweep.points[0], found).split()
    assert words[: words.index("--config")] == ["ptq", "run"]
    from ptq.cli.compose.hydra_edge import compose_jobs

    path = pathlib.Path(words[words.index("--config") + 1])
    [job] = compose_jobs(path, words[words.index("--config") + 2 :])
    assert job.recipe == sweep.points[0].recipe
