"""A run that is killed goes on after its last finished block, and ends with the bits of one that was not."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml

from ptq.cli.app import main
from ptq.errors import UserError
from ptq.network.block_stream import BlockStream
from ptq.run.experiment import output_folder, run
from ptq.run.kept.kept_pass import RESUME, KeptPass
from ptq.run.kept.state import alone
from tests.tools.same_bits import results, same
from tests.tools.tiny_runs import tiny_recipe

STATIC4 = {"weight": {"bits": 4}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}}
CLUSTERED = {
    "weight": {"bits": 4},
    "input": {"bits": 4, "granularity": "cluster", "symmetric": False},
    "key": {"bits": 8, "granularity": "token", "dynamic": True},
}
CASES = {
    "nearest": ({"weight": {"bits": 4}}, {"rtn": {}}),
    "searched": (STATIC4, {"smooth": {"search": True}, "gptq": {"target": "original"}}),
    "clustered": (CLUSTERED, {"smooth": {}, "cluster": {}, "gptq": {"target": "residual"}}),
    "formats": ({"weight": {"format": "nf4", "bits": 4, "granularity": "group", "group_size": 64}}, {"rtn": {}}),
}


GROUPS = {"weight": {"bits": 4, "granularity": "group", "group_size": 32}}


pytestmark = pytest.mark.usefixtures("every_block")


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


make = functools.partial(tiny_recipe, name="kept", samples=8, windows=8, execution={"save": True})


def kill_at(monkeypatch, count, before, what="quantize"):
    """Raises when the `count`-th block of the pass `what`, or of all for "", is to be kept, or has been."""
    calls = []
    keep = KeptPass.keep

    def killed(self, block):
        if what in {"", self.folder.name}:
            calls.append(block.index)
        if not before:
            keep(self, block)
        if len(calls) == count and what in {"", self.folder.name}:
            raise Killed
        if before:
            keep(self, block)

    monkeypatch.setattr(KeptPass, "keep", killed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "execution", [{}, {"weights": "offloaded", "hidden_states": "disk"}], ids=["resident", "offloaded"]
)
def test_a_run_killed_at_every_block_in_turn_ends_with_the_same_bits(
    tmp_path, tiny_llama, case, execution, monkeypatch
):
    scheme, steps = CASES[case]
    recipe = make(tmp_path / "a", tiny_llama, scheme, steps, execution={"save": True, **execution})
    expected = results(
        run(make(tmp_path / "b", tiny_llama, scheme, steps, execution={"save": True, **execution})), "identity"
    )
    for before in (True, False, False, True, False, True, False, True, False):
        with monkeypatch.context() as patch:
            kill_at(patch, 1, before, what="")
            try:
                folder = run(recipe)
            except Killed:
                continue
            break
    else:
        folder = run(recipe)
    same(results(folder, "identity"), expected)
    assert not (folder / RESUME).exists()


def taken_up_after(recipe, count, monkeypatch):
    """Kills the run after so many blocks were kept, and runs it again; returns the blocks that it passes then."""
    with monkeypatch.context() as patch:
        kill_at(patch, count, before=False)
        with pytest.raises(Killed):
            run(recipe)
    kept = []
    keep = KeptPass.keep
    monkeypatch.setattr(KeptPass, "keep", lambda self, block: (kept.append(block.index), keep(self, block)))
    run(recipe)
    return kept


def test_a_resumed_run_says_so_and_passes_only_the_blocks_that_are_left(tmp_path, tiny_llama, monkeypatch, capsys):
    recipe = make(tmp_path, tiny_llama, *CASES["nearest"])
    kept = taken_up_after(recipe, 3, monkeypatch)
    assert kept == [3]
    assert "resumed after block 3 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 3, 4])
def test_however_slow_the_disk_is_one_finished_block_at_most_is_done_again(tmp_path, tiny_llama, monkeypatch, count):
    monkeypatch.setattr("ptq.run.kept.kept_pass.WORST_SHARE", -1.0)
    recipe = make(tmp_path, tiny_llama, *CASES["nearest"])
    kept = taken_up_after(recipe, count, monkeypatch)
    assert kept == list(range(count - count % 2, 4))


@pytest.mark.parametrize("damage", ["hidden", "block", "progress", "cut"])
def test_what_was_kept_and_is_damaged_is_not_believed(tmp_path, tiny_llama, damage, monkeypatch):
    recipe = make(tmp_path, tiny_llama, *CASES["nearest"])
    expected = results(run(make(tmp_path / "whole", tiny_llama, *CASES["nearest"])), "identity")
    with monkeypatch.context() as patch:
        kill_at(patch, 3, before=False)
        with pytest.raises(Killed):
            run(recipe)
    [folder] = (tmp_path / "outputs" / "kept").iterdir()
    kept = folder / RESUME / "quantize"
    targets = {
        "hidden": kept.glob("hidden-*"),
        "block": [kept / "block-00001.safetensors"],
        "progress": [kept / "progress.json"],
    }
    for path in targets.get(damage, kept.glob("hidden-*")):
        data = bytearray(path.read_bytes())
        if damage == "cut":
            data = data[: len(data) // 2]
        else:
            data[len(data) // 3] ^= 0x10
        path.write_bytes(data)
    same(results(run(recipe), "identity"), expected)


def test_a_model_taken_up_in_the_middle_is_the_same_in_memory(tmp_path, tiny_llama, monkeypatch):
    files = {}
    for name, count in (("whole", None), ("killed", 2)):
        recipe = make(tmp_path / name, tiny_llama, GROUPS, {"gptq": {}}, export={"format": "compressed-tensors"})
        if count is not None:
            with monkeypatch.context() as patch:
                kill_at(patch, count, before=False)
                with pytest.raises(Killed):
                    run(recipe)
        folder = run(recipe)
        files[name] = {p.name: p.read_bytes() for p in (folder / "export" / "compressed-tensors").glob("*.safetensors")}
    assert files["whole"] == files["killed"] and files["whole"]


def test_a_process_that_is_killed_is_taken_up_by_the_next(tmp_path, tiny_llama):
    scheme, steps = CASES["searched"]
    recipe = make(tmp_path / "a", tiny_llama, scheme, steps)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    expected = results(run(make(tmp_path / "b", tiny_llama, scheme, steps)), "identity")
    command = [sys.executable, "-m", "ptq", "run", "--config", str(path)]
    folder = output_folder(recipe)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    deadline = time.monotonic() + 60
    while (
        not (folder / RESUME / "quantize" / "progress.json").exists()
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(recipe) == folder
    same(results(folder, "identity"), expected)


def test_the_statistics_and_the_baseline_are_taken_up_too(tmp_path, tiny_opt, monkeypatch):
    static = {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}}
    expected = results(run(make(tmp_path / "b", tiny_opt, static, {"rtn": {}})), "identity")
    recipe = make(tmp_path / "a", tiny_opt, static, {"rtn": {}})
    passed = []
    for count in (2, 3):
        with monkeypatch.context() as patch:
            kill_at(patch, count, before=False, what="")
            with pytest.raises(Killed):
                run(recipe)
    keep = KeptPass.keep
    monkeypatch.setattr(
        KeptPass, "keep", lambda self, block: (passed.append((self.folder.name, block.index)), keep(self, block))
    )
    folder = run(recipe)
    # Two blocks of the statistics were kept, then their other two and one of the baseline.
    assert passed == [*(("baseline", i) for i in (1, 2, 3)), *(("quantize", i) for i in range(4))]
    same(results(folder, "identity"), expected)


def test_plans_and_links_are_made_once_for_all_recipes_that_share_them(tmp_path, tiny_llama, monkeypatch, capsys):
    scheme, steps = CASES["searched"]
    first = run(make(tmp_path, tiny_llama, scheme, steps))
    capsys.readouterr()
    passes = []
    original = BlockStream.run
    monkeypatch.setattr(
        BlockStream,
        "run",
        lambda self, flows, visitor, what="blocks", kept=None: (
            passes.append(what),
            original(self, flows, visitor, what, kept),
        ),
    )
    again = run(make(tmp_path, tiny_llama, scheme, steps), force=True)
    other = run(make(tmp_path, tiny_llama, scheme, {**steps, "gptq": {"target": "present"}}))
    assert passes == ["quantize", "quantize"]
    assert capsys.readouterr().out.count("plan of smooth: made before, read from the store") == 2
    assert results(first, "identity")[2].keys() == results(again, "identity")[2].keys() and other != first
    same(results(again, "identity"), results(first, "identity"))


def test_a_second_process_at_the_same_run_is_refused_and_the_status_tells_of_each(
    tmp_path, tiny_llama, monkeypatch, capsys
):
    recipe = make(tmp_path, tiny_llama, *CASES["nearest"])
    with monkeypatch.context() as patch:
        kill_at(patch, 3, before=False)
        with pytest.raises(Killed):
            run(recipe)
    [folder] = (tmp_path / "outputs" / "kept").iterdir()
    assert main(["status", str(folder)]) == 0
    assert "quantize: 3 of 4 blocks" in capsys.readouterr().out
    with alone(folder):
        script = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert subprocess.run([sys.executable, "-c", script, folder / ".running"], capture_output=True).returncode != 0
        with pytest.raises(UserError, match=f"process {os.getpid()} is at work on this very run"):
            run(recipe)
        assert main(["status", str(folder)]) == 0
        assert f"running: process {os.getpid()}" in capsys.readouterr().out
    run(recipe)
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("finished: perplexity")
    assert main(["status", str(tmp_path)]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_run_ends_it_with_its_number_and_the_run_is_taken_up(tmp_path, tiny_llama, number):
    recipe = make(tmp_path, tiny_llama, *CASES["searched"])
    # Long enough that the signal comes while it works, however late this process gets to look.
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, windows=64))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    process = subprocess.Popen(
        [sys.executable, "-m", "ptq", "run", "--config", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup, which the tests may be under, SIGHUP is ignored and a run goes on.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    folder = tmp_path / "outputs" / "kept"
    deadline = time.monotonic() + 90
    while (
        not list(folder.glob(f"*/{RESUME}/*/progress.json")) and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"stopped: {number.name}; what was finished is kept, and the same command takes it up\n"
    assert json.loads((run(recipe) / "metrics.json").read_text())["windows"] == 64
