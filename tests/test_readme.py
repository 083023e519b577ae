"""The README's commands, run as written but for --dry-run, which does everything up to the work itself."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command, tmp_path):
    program, *arguments = shlex.split(command)
    assert program == "python"
    extra = [f"outputs={tmp_path / 'o'}", f"store={tmp_path / 's'}"]
    extra += [] if "--dry-run" in arguments else ["--dry-run"]
    done = subprocess.run([sys.executable, *arguments, *extra], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ok: smollm2-135m" in done.stdout or (" -m " in command and ", 0 refused, " in done.stdout)


def test_the_two_commands_and_every_linked_document_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in re.findall(r"^    make (\w+)", README, re.M))
    assert all((ROOT / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", README))


def test_no_command_or_default_names_a_file_that_a_clone_does_not_have():
    texts = [
        p for part in ("docs", "configs", "experiments", "ptq") for p in sorted((ROOT / part).rglob("*")) if p.is_file()
    ]
    read = [p for p in [ROOT / "README.md", *texts] if p.suffix in {".md", ".yaml", ".py"}]
    assert [str(p) for p in read if "../shared" in p.read_text(encoding="utf-8")] == []
