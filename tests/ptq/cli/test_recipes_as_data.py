"""A recipe that somebody sent is data: it runs no code, reads no environment and fills no memory unless the command line says so."""

import os
import pathlib
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ptq.cli import catalog
from ptq.cli.app import main
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.cli.compose.override_words import quoted
from ptq.errors import UserError
from ptq.files.bounded import MOST_DEPTH, MOST_NODES, check_yaml

MODULE = """
import pathlib
from dataclasses import dataclass
from ptq.steps import Transform

pathlib.Path(__file__).with_name("imported").touch()


@dataclass(frozen=True)
class Options:
    pass


class Step(Transform):
    pass


class Other:
    def __init__(self, options):
        pathlib.Path(__file__).with_name("ran").touch()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the module sent_along, which says when it is imported."""
    (tmp_path / "sent_along.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "sent_along", raising=False)
    return tmp_path


def compose(path: pathlib.Path, *overrides: str, trust: bool = False):
    [job] = compose_jobs(path.resolve(), list(overrides), trust=trust)
    return job


def recipe(folder: pathlib.Path, file: str = "sent.yaml", **content) -> pathlib.Path:
    path = folder / file
    path.write_text(yaml.safe_dump({"model": {"path": "somebody/something"}, **content}, sort_keys=False))
    return path


def test_code_named_in_a_recipe_file_is_refused_before_it_is_imported_and_runs_by_trust(folder, capsys):
    path = recipe(folder, steps={"mine": {"_target_": "sent_along.Step"}})
    assert main(["run", "--config", str(path), "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert "steps.mine._target_: 'sent_along.Step' in a recipe file would run code" in line and "--trust" in line
    assert not (folder / "imported").exists()
    assert compose(path, trust=True).recipe.steps["mine"]["_target_"] == "sent_along.Step"


def test_code_typed_on_the_command_line_needs_no_trust(folder):
    bare, named = recipe(folder), recipe(folder, "named.yaml", steps={"mine": {"_target_": "sent_along.Other"}})
    for path in (bare, named):
        for typed in ("++steps.mine._target_=sent_along.Step", "+steps.mine={_target_: sent_along.Step}"):
            assert compose(path, typed).recipe.steps["mine"]["_target_"] == "sent_along.Step"
    with pytest.raises(UserError, match="would run code"):  # another key does not vouch for this one
        compose(named, "+steps.yours._target_=sent_along.Other")


@pytest.mark.parametrize(
    "content",
    [
        {"steps": {"mine": {"_target_": "${name}"}}, "name": "sent_along.Step"},
        {"model": {"path": "x/y", "trust_remote_code": True}},
        {"model": {"path": "x/y", "trust_remote_code": "${data.on}"}, "data": {"on": True}},
        {"name": "${oc.env:HOME}"},
        {"name": "${oc.${x}:HOME}", "x": "env"},
        {"hydra": {"searchpath": ["pkg://sent_along"]}},
        {"defaults": [{"hydra/launcher": "basic"}, "_self_"]},
        {"defaults": [{"override /hydra/output": "default"}, "_self_"]},
        {"defaults": [{"scheme": "mine"}, "_self_"]},
    ],
)
def test_every_way_to_code_and_to_the_environment_is_closed_to_a_file(folder, content):
    (folder / "scheme").mkdir()
    (folder / "scheme" / "mine.yaml").write_text("# @package _global_\nsteps: {a: {_target_: sent_along.Step}}\n")
    path = recipe(folder, **content)
    with pytest.raises(UserError, match="run code|oc.env|hydra"):
        compose(path)
    assert not (folder / "imported").exists()


def test_the_environment_is_read_for_shipped_configs_for_what_was_typed_and_by_trust(folder, monkeypatch):
    monkeypatch.setenv("SENT_HOME", "/sent")
    monkeypatch.setenv("PTQ_DATA", "/data")
    path = recipe(folder, name="${oc.env:SENT_HOME}x")
    path.write_text("model: {path: '${oc.env:SENT_HOME}/x'}\ndefaults: [{data: smol-wt2}, _self_]\n")
    assert compose(path, trust=True).recipe.model.path == "/sent/x"
    typed = compose(path, "model.path='${oc.env:SENT_HOME}/y'").recipe
    assert (typed.model.path, typed.data.evaluation.path.startswith("/data/")) == ("/sent/y", True)


@pytest.mark.parametrize(
    ("target", "said"),
    [("sent_along.Other", "is no step"), ("sent_along.pathlib", "is no step"), ("3", "is no import path"),
     ("os.system", "is no step"), ("nowhere.Step", "ModuleNotFoundError"), ("[a]", "is no import path")],
)  # fmt: skip
def test_what_is_no_step_is_refused_and_nothing_of_it_runs(folder, target, said, capsys):
    path = recipe(folder)
    assert main(["run", "--config", str(path), f"+steps.mine._target_={target}", "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not (folder / "ran").exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "values, its aliases copied out"),
        ("a: &a [*a]\n", "stands inside what it names"),
        ("a: " + "[" * 5000 + "]" * 5000, "deep"),
        ("\n".join(f"{' ' * i}a:" for i in range(400)), "deep"),
        ("a: b\n" * 300_000, "bytes"),
        ("model: !!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_a_file_that_would_fill_the_memory_or_the_stack_gets_one_line_at_once(folder, content, said, capsys):
    (folder / "scheme").mkdir()
    (folder / "bomb.yaml").write_text(content)
    (folder / "scheme" / "bomb.yaml").write_text(content)
    outer = recipe(folder, "outer.yaml", defaults=[{"scheme": "bomb"}, "_self_"])
    for path in (folder / "bomb.yaml", outer):
        began = time.monotonic()
        assert main(["run", "--config", str(path), "--dry-run"]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
        assert time.monotonic() - began < 10


@given(
    st.recursive(st.integers() | st.text("ab"), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text("ab"), x))
)
def test_every_plain_value_within_the_bounds_passes(value):
    check_yaml(yaml.safe_dump(value))


def test_the_bounds_are_what_they_say():
    check_yaml(f"[{', '.join(['x'] * (MOST_NODES - 2))}]")
    check_yaml("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    for text in (f"[{', '.join(['x'] * MOST_NODES)}]", "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1)):
        with pytest.raises(ValueError):
            check_yaml(text)
    deep = "a: &a " + "[" * 30 + "]" * 30
    with pytest.raises(ValueError, match="deep"):
        check_yaml(f"{deep}\nb: " + "[" * 30 + "*a" + "]" * 30)


@pytest.mark.parametrize(
    ("typed", "value"),
    [("é/ü", "é/ü"), ("~/models/x", "~/models/x"), ("/my models/日本 語", "/my models/日本 語"), ("'é, a'", "é, a"),
     ("a#b&c;d", "a#b&c;d"), ("C:\\é\\", "C:\\é\\"), ("/plain/x", "/plain/x")],
)  # fmt: skip
def test_values_in_any_script_and_with_any_usual_character_arrive_as_typed(folder, typed, value):
    assert compose(recipe(folder), f"model.path={typed}").recipe.model.path == value


@given(
    st.text(
        st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"], exclude_characters="'\"\\,()[]{}=:$"),
        min_size=1,
    )
)
def test_any_word_of_letters_arrives_as_typed(word):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    line = quoted(f"model.path=/é/{word}")
    [override] = OverridesParser.create().parse_overrides([line])
    assert override.value() == f"/é/{word}"


def test_a_relative_path_is_looked_for_beside_the_recipe_then_in_the_working_folder(folder, monkeypatch, capsys):
    beside, working = folder / "my recipes", folder / "work"
    for place in (beside, working):
        place.mkdir()
    (beside / "here é.txt").write_text("x")
    (working / "there.txt").write_text("x")
    (working / "here é.txt").write_text("x")
    monkeypatch.chdir(working)
    data = {
        "calibration": {"source": "file", "path": "here é.txt"},
        "evaluation": {"source": "file", "path": "there.txt"},
    }
    job = compose(recipe(beside, data=data))
    assert job.recipe.data.calibration.path == str(beside / "here é.txt")
    assert job.recipe.data.evaluation.path == "there.txt"
    assert job.missing == ()
    typed = compose(recipe(beside, data=data), "data.calibration.path='here é.txt'").recipe
    assert typed.data.calibration.path == "here é.txt"  # of the working folder, as in any command
    data["evaluation"]["path"] = "nowhere.txt"
    assert main(["run", "--config", str(recipe(beside, data=data)), "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert "data.evaluation.path: nowhere.txt is not there: looked for beside the recipe in " in line
    assert str(beside) in line and f"then in {working}" in line
    local = recipe(beside, model={"path": "models/x/y.gguf"})
    assert "model.path: models/x/y.gguf is not there" in compose(local).missing[0]
    assert compose(recipe(beside, model={"path": "owner/name"})).missing == ()


def test_a_name_comes_from_the_file_and_is_always_one_of_a_folder(folder):
    for stem, name in (
        ("my recipe", "my-recipe"),
        ("été", "t"),
        ("..x", "x"),
        ("日本", "recipe"),
        ("fine_1.b", "fine_1.b"),
    ):
        assert compose(recipe(folder, f"{stem}.yaml")).recipe.name == name


def test_shipped_recipes_need_no_trust():
    for name in catalog.recipes():
        compose_jobs(catalog.locate(name), [])
    assert "SENT_HOME" not in os.environ
