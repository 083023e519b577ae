"""What the command line says of itself: lists, meanings of options, defaults, completion, advice that works."""

import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from ptq.cli import catalog, completion, reference
from ptq.cli.app import main
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.steps._registry import build_steps, shipped
from quantize.spec.formats import formats

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_list_has_all_there_is_and_says_something_of_each(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for section in reference.SECTIONS:
        found = reference.entries(section)
        assert found and all(len(about) > 10 for about in found.values()), section
        assert f"{section}:" in out
    assert set(reference.entries("steps")) == set(shipped())
    assert {"smollm2-135m_w8a8", "w4a16", "nf4", "gptq", "gguf", "smooth_alpha", "solvers"} <= set(
        re.findall(r"^  (\S+) ", out, re.M)
    )
    assert main(["list", "schems"]) == 2
    assert "did you mean 'schemes'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", sorted({n for n in reference.names() if n.count(".") < 2 or n.startswith("scheme.weight")})
)
def test_show_knows_every_part_and_every_option_has_a_meaning(name, capsys):
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: ")
    part = reference.find(name)
    if part.schema is not None:
        meanings = reference.attributes(part.schema)
        assert [f.name for f in dataclasses.fields(part.schema) if len(meanings.get(f.name, "")) < 6] == []
        assert all(f"  {f.name}: " in out for f in dataclasses.fields(part.schema))


def test_the_commands_that_say_what_there_is_answer_without_torch():
    code = (
        "import sys; from ptq.cli.app import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'numpy', 'hydra', 'omegaconf'} & set(sys.modules), sys.argv"
    )
    for words in (
        ["list"],
        ["list", "--help"],
        ["--help"],
        ["show", "scheme.weight"],
        ["show", "evaluation.windows"],
        ["run", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stdout, (words, done.stderr)


def test_formats_are_read_in_their_source_as_they_are_registered():
    assert list(reference.written_formats().items()) == list(formats().items())


def test_show_says_default_choices_bounds_and_what_an_option_is_read_with(capsys):
    assert main(["show", "steps.gptq"]) == 0
    out = capsys.readouterr().out
    assert "damping: number, default 0.01" in out and "choices: present, original, residual" in out
    assert main(["show", "steps.smooth.alpha"]) == 0
    assert "only with search: false" in capsys.readouterr().out
    assert main(["show", "evaluation.resamples"]) == 0
    assert "at least 100, at most 1000000" in capsys.readouterr().out
    for wrong, right in (
        ("steps.gpqt", "steps.gptq"),
        ("scheme.wieght", "scheme.weight"),
        ("evaluation.windws", "windows"),
    ):
        assert main(["show", wrong]) == 2
        assert f"did you mean '{right}" in capsys.readouterr().err.replace("evaluation.windows", "windows")


def test_cfg_full_is_the_recipe_with_every_default_and_builds_the_same_one(capsys):
    assert main(["run", "--config", "smollm2-135m_w8a8_static", "--cfg", "full"]) == 0
    full = yaml.safe_load(capsys.readouterr().out)
    assert full["steps"]["smooth"]["candidates"] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert full["evaluation"]["confidence"] == 0.95 and full["execution"]["device"] != "auto"
    assert recipe_from(full).as_dict() == full


@pytest.mark.parametrize(
    "command", [[], ["run"], ["stats"], ["text"], ["list"], ["show"], ["export"], ["inspect"], ["store"]]
)
def test_every_command_knows_its_version(command, capsys):
    assert main([*command, "--version"]) == 0
    assert re.fullmatch(r"ptq \d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_advice_for_a_transform_beside_a_solver_is_a_command_that_works():
    [job] = compose_jobs(catalog.locate("smollm2-135m_w4a16"), ["+steps.smooth={}"])
    with pytest.raises(UserError, match="a transform after the solver gptq") as error:
        build_steps(job.recipe.steps)
    words = shlex.split(str(error.value).partition("on a command line by ")[2])
    [job] = compose_jobs(catalog.locate("smollm2-135m_w4a16"), words)
    assert list(build_steps(job.recipe.steps)) == ["smooth", "gptq"]
    assert job.recipe.steps["gptq"] == {"target": "residual"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ptq ru", {"run"}),
        ("ptq run --config dem", {"demo"}),
        ("ptq run --config=dem", {"demo"}),
        ("ptq run scheme=w4a16_", {"w4a16_g32", "w4a16_g64"}),
        ("ptq run --config demo evaluation.win", {"evaluation.windows="}),
        ("ptq run steps.gptq.tar", {"steps.gptq.target="}),
        ("ptq run model.dtype=b", {"bfloat16"}),
        ("ptq run scheme.weight.format=nv", {"nvfp4"}),
        ("ptq run '~steps.s", set()),
        ("ptq run --dry", {"--dry-run"}),
        ("ptq show steps.gptq.d", {"steps.gptq.damping", "steps.gptq.descent"}),
        ("ptq list sch", {"schemes"}),
        ("ptq --completion z", {"zsh"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(line, expected, tmp_path):
    program = tmp_path / "ptq"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ptq "$@"\n')
    program.chmod(0o755)
    code = f"{completion.script('bash')}\nCOMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; _ptq\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) - {"ptq"} == expected, done.stderr


def test_completion_needs_neither_torch_nor_hydra_and_other_shells_have_theirs(capsys):
    code = (
        "import sys; from ptq.cli.app import main; assert main(['--complete', 'run', 'steps.']) == 0; "
        "assert not {'torch', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "steps.gptq.damping=" in done.stdout, done.stderr
    for shell in completion.SCRIPTS:
        assert main(["--completion", shell]) == 0
        text = capsys.readouterr().out
        assert "ptq --complete" in text
        if shutil.which(shell):
            checked = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, timeout=60)
            assert checked.returncode == 0, checked.stderr
    assert main(["--completion", "bsh"]) == 2
    assert "did you mean 'bash'" in capsys.readouterr().err
