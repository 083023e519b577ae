"""The command `ptq footprint`: what it prints, and the one line that a mistake gets."""

import re
import subprocess
import sys

import pytest

from ptq.cli.app import main

MEMORY = {  # GB of the notes (METHODS.md section 1): the file, then loaded
    "chatglm-like": {"file": 13.4, "fp16": 12.6, "int8": 7.5},
    "moss-like": {"file": 33.5, "fp32": 63, "fp16": 32.5, "int8": 18.5},
}


def row(text, title):
    """The cells of the table row that starts with `title`."""
    [line] = [line for line in text.splitlines() if re.match(rf"[│|] *{re.escape(title)} ", line)][-1:]
    return [cell.strip() for cell in line.strip("│|").split("│")][1:]


@pytest.mark.parametrize("name", sorted(MEMORY))
def test_a_shipped_shape_is_within_a_tenth_of_the_published_memory(name, capsys):
    assert main(["footprint", "--config", name]) == 0
    text = capsys.readouterr().out
    gibibytes = dict(zip(["fp32", "fp16", "int8", "int4", "scheme"], map(float, row(text, "all, GiB")), strict=True))
    published = dict(MEMORY[name])
    file = published.pop("file")
    assert gibibytes["fp16"] * 2**30 / 1e9 == pytest.approx(file, rel=0.002)
    for form, size in published.items():
        assert gibibytes[form] == pytest.approx(size, rel=0.1)
    assert gibibytes["scheme"] == gibibytes["int8"]
    assert float(row(text, "attention")[1].rstrip("%")) > 25


def test_context_and_overrides_reach_the_tables(capsys):
    arguments = ["footprint", "--config", "chatglm-like", "--context", "100", "scheme.value.bits=4"]
    assert main([*arguments, "scheme.value.granularity=token", "scheme.value.dynamic=true"]) == 0
    text = capsys.readouterr().out
    assert "100 tokens" in text
    fp16, scheme = (row(text, title)[0] for title in ("fp16", "scheme"))
    assert int(fp16) == 28 * 2 * 4096 * 2
    assert int(scheme) == 28 * (2 * 4096 + 4096 // 2 + 32 * 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.path=./no/such/folder"], "is not there"),
        (["model.pth=x"], "did you mean 'path'"),
        (["scheme=w4a16_g64", "scheme.weight.group_size=77"], "77 does not divide"),
        (["--context", "4096"], "--context: 4096: expected 1 to 2048"),
        (["--context", "many"], "--context"),
        (["--dry-run"], "no such option"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, said, capsys):
    assert main(["footprint", "--config", "chatglm-like", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err


def test_a_shape_without_weights_is_refused_by_a_run(capsys, tmp_path):
    assert main(["run", "--config", "chatglm-like", f"outputs={tmp_path}", f"store={tmp_path}"]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err


def test_help_names_the_command_and_its_option(capsys):
    assert main(["--help"]) == 0
    assert "footprint" in capsys.readouterr().out
    assert main(["footprint", "--help"]) == 0
    assert "--context" in capsys.readouterr().out


def test_the_folder_of_shapes_is_no_group_of_choices():
    done = subprocess.run(
        [sys.executable, "-c", "from ptq.cli.catalog import groups; print(sorted(groups()))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "'model'" in done.stdout
    assert "shapes" not in done.stdout
