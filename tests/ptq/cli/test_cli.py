"""The command line: what is rewritten, what reaches the work, and the one line that a mistake gets."""

import errno
import os
import pathlib
import subprocess
import sys
import types

import pytest

from ptq.cli import catalog
from ptq.cli.app import main, rewrite, run_command, stats_command
from ptq.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def work(monkeypatch):
    """Stands in for ptq.run.experiment and notes what it is asked to do."""
    calls = []
    module = types.ModuleType("ptq.run.experiment")
    module.run = lambda recipe, force, world: calls.append(("run", recipe))
    module.dry_run = lambda recipe: calls.append(("dry_run", recipe))
    module.collect_statistics = lambda recipe, output, world: calls.append(("stats", recipe, output))
    monkeypatch.setitem(sys.modules, "ptq.run.experiment", module)
    return types.SimpleNamespace(calls=calls, module=module)


@pytest.mark.parametrize("form", [["--config", "demo"], ["--config=demo"], ["--config", "demo.yaml"]])
def test_config_becomes_the_two_options_that_hydra_knows(form):
    rewritten = rewrite([*form, "a.b=1", "-m"])
    assert rewritten == [f"--config-dir={catalog.config_folder()}", "--config-name=demo", "a.b=1", "-m"]


def test_config_takes_a_path_to_a_file_anywhere(tmp_path):
    (tmp_path / "mine here.yaml").write_text("name: x\n")
    assert rewrite([f"--config={tmp_path}/mine here.yaml"]) == [f"--config-dir={tmp_path}", "--config-name=mine here"]


def test_a_shipped_recipe_wins_over_a_file_of_that_name_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert catalog.locate("demo") == catalog.config_folder() / "demo.yaml"


def test_without_a_config_the_demo_runs(work):
    assert main(["run"]) == 0
    [(kind, recipe)] = work.calls
    assert kind == "run"
    assert recipe.name == "demo"


def test_the_two_doors_lead_to_their_commands(work):
    assert run_command(["--dry-run"]) == 0
    assert stats_command(["--output", "~/x.safetensors"]) == 0
    assert [call[0] for call in work.calls] == ["dry_run", "stats"]
    assert work.calls[1][2] == pathlib.Path("~/x.safetensors").expanduser()


def test_overrides_reach_the_recipe_also_for_keys_the_yaml_does_not_mention(work):
    arguments = ["run", "evaluation.windows=20", "execution.weights=offloaded", "--config", "opt-1.3b_w4a4.yaml"]
    assert main([*arguments, "scheme.input.bits=8", "scheme.exclude=[lm_head]", "+evaluation.chunk=64"]) == 0
    recipe = work.calls[0][1]
    assert (recipe.name, recipe.evaluation.windows, recipe.evaluation.chunk) == ("opt-1.3b_w4a4", 20, 64)
    assert (recipe.scheme.weight.bits, recipe.scheme.input.bits) == (4, 8)
    assert recipe.execution.weights == "offloaded"
    assert recipe.scheme.exclude == ("lm_head",)


def test_a_tilde_removes_a_step_and_a_group(work):
    assert main(["run", "~steps.rtn", "~scheme"]) == 0
    recipe = work.calls[0][1]
    assert recipe.steps == {}
    assert recipe.scheme.weight is None


def test_a_file_outside_finds_the_shipped_groups_and_its_own(tmp_path, work):
    (tmp_path / "scheme").mkdir()
    (tmp_path / "scheme" / "mine.yaml").write_text("weight: {bits: 3, granularity: channel}\n")
    recipe = (
        "defaults: [{model: opt-125m}, {data: docs}, {scheme: mine}, {method: rtn}, _self_]\nevaluation: {windows: 3}\n"
    )
    (tmp_path / "my recipe.yaml").write_text(recipe)
    assert main(["run", "--config", str(tmp_path / "my recipe.yaml")]) == 0
    made = work.calls[0][1]
    assert (made.name, made.model.path, made.scheme.weight.bits) == ("my-recipe", "facebook/opt-125m", 3)
    assert main(["stats", "--config", str(tmp_path / "my recipe.yaml"), "-m", "scheme=mine,w4a4", "~method"]) == 0
    assert [call[1].scheme.weight.bits for call in work.calls[1:]] == [3, 4]


def test_folders_of_results_beside_a_recipe_are_no_config_groups(tmp_path, work, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [{model: opt-125m}, {method: rtn}, _self_]\noutputs: outputs\nscheme: {weight: {bits: 8}}\n"
    )
    for place in ("outputs", "store", "name", "calibration", "data"):
        (tmp_path / place / "mine" / "0123456789ab").mkdir(parents=True)
        (tmp_path / place / "mine" / "recipe.yaml").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    typed = ["outputs=elsewhere", "store='my store'", "name=other", "+data=docs"]
    assert main(["run", "--config", "mine.yaml", *typed]) == 0
    made = work.calls[0][1]
    assert (made.outputs, made.store, made.name, made.data.evaluation.split) == (
        "elsewhere",
        "my store",
        "other",
        "test",
    )


def test_multirun_is_the_product_of_its_values_the_last_varying_fastest(work, capsys):
    assert main(["stats", "-m", "scheme=w8a8,w4a4", "evaluation.windows=range(1,3)", "evaluation.seed=5"]) == 0
    got = [(r.scheme.weight.bits, r.evaluation.windows, r.evaluation.seed) for _, r, _ in work.calls]
    assert got == [(8, 1, 5), (8, 2, 5), (4, 1, 5), (4, 2, 5)]
    assert "job 4 of 4: scheme=w4a4 evaluation.windows=2" in capsys.readouterr().out


def test_a_mistake_in_any_job_of_statistics_stops_it_before_the_first(work, capsys):
    assert main(["stats", "-m", "scheme.weight.bits=8,9"]) == 2
    assert work.calls == []
    assert "scheme.weight.bits: 9" in capsys.readouterr().err


def test_cfg_job_prints_the_composed_config_and_runs_nothing(work, capsys):
    assert main(["run", "--cfg", "job", "data=smol-wt2"]) == 0
    out = capsys.readouterr().out
    assert "wikitext2-test-head.txt" in out
    assert "${" not in out
    assert work.calls == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "smollm2-135m_w8a9.yaml"], "did you mean 'smollm2-135m_w8a8'"),
        (["--config", "no/such/demmo.yaml"], "did you mean 'demo'"),
        (["--config"], "no name given"),
        (["evalution.windows=2"], "did you mean 'evaluation'"),
        (["evaluation.windws=2"], "did you mean 'windows'"),
        (["modle=opt-125m"], "did you mean 'model'"),
        (["scheme=w8a9"], "did you mean 'w8a8'"),
        (["scheme.weight.bits=9"], "scheme.weight.bits: 9"),
        (["scheme.weight.granularity=chanel"], "did you mean 'channel'"),
        (["evaluation.windows=many"], "'many' is not a whole number"),
        (["evaluation.windows=1,2"], "add -m"),
        (["-m", "evaluation.windows=interval(1,2)"], "an interval"),
        (["~steps.rtm"], "~steps.rtm"),
        (["name=[1"], "not an override"),
        (["just-a-word"], "not an override"),
        (["model.path=${nowhere.at.all}"], "nowhere"),
        (["hydra.verbose=true"], "Hydra's own settings"),
        (["--dryrun"], "did you mean '--dry-run'"),
        (["--cfg", "jop"], "invalid choice"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, said, work, capsys):
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert captured.out == ""
    assert work.calls == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: {path: x}\nmodel: {path: y}\n", "duplicate key"),
        (b"model: [1, 2\n", "line"),
        (b"- a\n- b\n", "bad.yaml"),
        (b"", "model: missing"),
        (b"\xff\xfe\x00\x01", "bad.yaml"),
        (b"defaults: [{scheme: w8a9}, _self_]\nmodel: {path: x}\n", "did you mean 'w8a8'"),
        (b"defaults: [demmo, _self_]\n", "demmo"),
        (b"model:\n  path: ???\n", "model.path"),
    ],
)
def test_a_broken_recipe_file_gets_one_line_and_status_2(content, said, tmp_path, work, capsys):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert main(["run", "--config", str(tmp_path / "bad.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def test_a_group_that_the_recipe_lacks_can_be_added(tmp_path, work, capsys):
    (tmp_path / "bare.yaml").write_text("model: {path: x}\n")
    assert main(["run", "--config", str(tmp_path / "bare.yaml"), "scheme=w4a16"]) == 2
    assert "write +scheme=" in capsys.readouterr().err
    assert main(["run", "--config", str(tmp_path / "bare.yaml"), "+scheme=w4a16"]) == 0
    assert work.calls[0][1].scheme.weight.bits == 4


def test_an_export_is_added_changed_or_left_out_whether_or_not_the_recipe_names_one(tmp_path, work):
    (tmp_path / "bare.yaml").write_text("model: {path: x}\n")
    (tmp_path / "named.yaml").write_text("defaults: [{export: kuiper}, _self_]\nmodel: {path: x}\n")
    (tmp_path / "direct.yaml").write_text("model: {path: x}\nexport: {format: kuiper}\n")
    for name, chosen, expected in (
        ("bare", ["export=llama2c"], "llama2c"), ("bare", ["export=null"], None), ("bare", [], None),
        ("named", ["export=llama2c"], "llama2c"), ("named", ["export=null"], None), ("named", [], "kuiper"),
        ("direct", [], "kuiper"),
        ("named", ["export.options.build=llama3"], "kuiper"),
    ):  # fmt: skip
        assert main(["run", "--config", str(tmp_path / f"{name}.yaml"), *chosen]) == 0
        export = work.calls[-1][1].export
        assert (export.format if export else None) == expected
    assert work.calls[-1][1].export.options == {"build": "llama3"}
    assert main(["run", "--config", str(tmp_path / "direct.yaml"), "export=null"]) == 2


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (UserError("field: 1: use 2"), 2, "error: field: 1: use 2"),
        (KeyboardInterrupt(), 130, "stopped: "),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y"), 2, "error: /x/y: the disk is full"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x/y"), 2, "error: /x/y: not permitted"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
    ],
)
def test_what_ends_a_run_gets_one_line_and_its_status(raised, status, said, work, capsys):
    def fail(recipe, force, world):
        raise raised

    work.module.run = fail
    assert main(["run"]) == status
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_defect_of_ours_is_not_dressed_up_as_a_mistake_of_the_user(work):
    def fail(recipe, force, world):
        raise ZeroDivisionError

    work.module.run = fail
    with pytest.raises(ZeroDivisionError):
        main(["run"])


def test_help_lists_recipes_and_groups_and_needs_neither_torch_nor_hydra():
    code = (
        "import sys; from ptq.cli.app import main; assert main(['run', '--help']) == 0; "
        "assert not {'torch', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in (*catalog.recipes(), "scheme=", "w4a16_g64", "examples:"):
        assert word in done.stdout


def test_python_m_ptq_knows_its_commands_and_says_the_nearest_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ptq", "rum"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: 'rum' is not a command; did you mean 'run'?\n"
