"""Several ranks end with the bits of one; a rank that ends early ends all; what was kept is taken up by any number of them."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.ranks.reduction import by_cost, done_by, in_order, in_shares
from ptq.ranks.world import ALONE, Message, agree, led
from ptq.run.experiment import collect_statistics, run
from ptq.steps.tuners import tune
from tests.tools.ranks import as_program, in_world, killed_after, run_ranks
from tests.tools.same_bits import results, same

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent
CASES = {
    "gptq": ({"weight": {"bits": 4}}, {"gptq": {}}),
    "targets": (
        {"weight": {"bits": 3}, "input": {"bits": 8, "granularity": "tensor", "dynamic": False, "range": "mse"}},
        {"smooth": {}, "gptq": {"target": "residual", "held_out": 4, "search_damping": True}},
    ),
    "nearest": (
        {"weight": {"bits": 4}, "input": {"bits": 8, "granularity": "tensor", "dynamic": False}},
        {"rtn": {"scales": "block"}},
    ),
    "maps": (
        {"weight": {"bits": 4}, "input": {"bits": 4, "granularity": "token", "symmetric": False, "dynamic": True}},
        {"wush": {}, "rtn": {}},
    ),
    "statistics behind maps": (
        {"weight": {"bits": 4}, "input": {"bits": 8, "granularity": "tensor", "dynamic": False}},
        {"wush": {}, "rtn": {}},
    ),
    "learned maps": (
        {"weight": {"bits": 4}, "input": {"bits": 4, "granularity": "token", "symmetric": False, "dynamic": True}},
        {"affine": {"steps": 4}, "clip": {}, "rtn": {}},
    ),
    "learned": ({"weight": {"bits": 3}}, {"autoround": {"steps": 4, "target": "original"}}),
    "learned scales": ({"weight": {"bits": 3}}, {"omniquant": {"steps": 4}}),
    "tuned": ({"weight": {"bits": 4}}, {"rtn": {}, "tune": {"steps": 4, "batch": 3}}),
}


def make(folder, model, scheme, steps, **changes):
    base = {
        "name": "ranks",
        "model": {"path": str(model)},
        "calibration": {"samples": 10, "length": 32, "batch_size": 2},
        "evaluation": {"windows": 6, "length": 32, "batch_size": 1},
        "scheme": scheme,
        "steps": steps,
        "outputs": str(folder / "outputs"),
        "store": str(folder / "store"),
        # Processes that are forked may not begin CUDA.
        "execution": {"save": True, "device": "cpu"},
    }
    return recipe_from({**base, **changes})


def result_of(folder):
    (found,) = (folder / "outputs" / "ranks").iterdir()
    return results(found)


def work_of(recipe):
    return in_world(lambda world: run(recipe, world=world) and None)


@pytest.mark.parametrize("case", CASES)
def test_two_and_four_ranks_end_with_the_bits_of_one(tmp_path, tiny_llama, case):
    expected = results(run(make(tmp_path / "1", tiny_llama, *CASES[case])))
    for ranks in (2, 4) if "gptq" in CASES[case][1] else (2,):
        recipe = make(tmp_path / str(ranks), tiny_llama, *CASES[case])
        ended = run_ranks(ranks, work_of(recipe), tmp_path / f"out-{ranks}")
        assert [e.status for e in ended] == [0] * ranks, ended
        assert all(not e.text for e in ended[1:])
        same(result_of(tmp_path / str(ranks)), expected)


def test_ranks_share_the_rows_of_a_weight_and_note_once_what_was_found(tmp_path, tiny_llama, monkeypatch):
    import ptq.steps.solvers._tall_weight as tall

    case = {"weight": {"bits": 3, "symmetric": False, "range": "mse"}}, {"gptq": {"target": "residual", "held_out": 4}}
    whole = results(run(make(tmp_path / "whole", tiny_llama, *case)))
    monkeypatch.setattr(tall, "PIECES", {4: 32, 2: 16})
    expected = results(run(make(tmp_path / "1", tiny_llama, *case)))
    apart = [
        (block[key] != of[key]).float().mean()
        for block, of in zip(whole[2].values(), expected[2].values(), strict=True)
        for key in of
        if key.endswith("codes")
    ]
    assert max(apart) < 0.02, "rows that are solved apart are rounded otherwise where products are, no more"
    for ranks in (2, 3):
        recipe = make(tmp_path / str(ranks), tiny_llama, *case)
        ended = run_ranks(ranks, work_of(recipe), tmp_path / f"out-{ranks}")
        assert [e.status for e in ended] == [0] * ranks, ended
        same(result_of(tmp_path / str(ranks)), expected)
    logs = [next((tmp_path / name / "outputs").rglob("run.log")).read_text() for name in ("1", "3")]
    notes = [[line.partition("gptq: ")[2] for line in log.splitlines() if "gptq: " in line] for log in logs]
    assert notes[0] == notes[1]


def test_ranks_share_the_experts_of_a_mixture_and_offloaded_weights(tmp_path, tiny_mixtral):
    changes = {
        "calibration": {"samples": 10, "length": 32, "batch_size": 2, "experts": "at-least-40"},
        "execution": {"save": True, "weights": "offloaded", "hidden_states": "disk"},
    }
    case = {"weight": {"bits": 3}}, {"smooth": {}, "gptq": {"sequential": False}}
    expected = results(run(make(tmp_path / "1", tiny_mixtral, *case, **changes)))
    ended = run_ranks(2, work_of(make(tmp_path / "2", tiny_mixtral, *case, **changes)), tmp_path / "out")
    assert [e.status for e in ended] == [0, 0], ended
    same(result_of(tmp_path / "2"), expected)


def test_ranks_share_the_gradients_of_a_mixture_that_learns(tmp_path, tiny_mixtral):
    changes = {
        "calibration": {"samples": 14, "length": 32, "batch_size": 4, "experts": "at-least-40"},
        "execution": {"save": True, "weights": "offloaded", "hidden_states": "disk"},
    }
    case = {"weight": {"bits": 3}}, {"autoround": {"steps": 3}}
    expected = results(run(make(tmp_path / "1", tiny_mixtral, *case, **changes)))
    ended = run_ranks(4, work_of(make(tmp_path / "4", tiny_mixtral, *case, **changes)), tmp_path / "out")
    assert [e.status for e in ended] == [0] * 4, ended
    same(result_of(tmp_path / "4"), expected)


def test_statistics_of_two_ranks_are_those_of_one(tmp_path, tiny_mixtral):
    def take(folder, world=ALONE):
        recipe = make(tmp_path / folder, tiny_mixtral, *CASES["gptq"])
        return collect_statistics(recipe, tmp_path / folder / "statistics.safetensors", world)

    one = load_file(take("1"))
    ended = run_ranks(2, in_world(lambda world: take("2", world) and None), tmp_path / "out")
    assert [e.status for e in ended] == [0, 0], ended
    two = load_file(tmp_path / "2" / "statistics.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


def test_a_killed_rank_ends_all_in_one_line_and_another_number_of_ranks_takes_the_run_up(
    tmp_path, tiny_llama, every_block
):
    case = CASES["gptq"]
    expected = results(run(make(tmp_path / "1", tiny_llama, *case)))
    recipe = make(tmp_path / "2", tiny_llama, *case)
    ended = run_ranks(3, killed_after(work_of(recipe), 2, 1), tmp_path / "killed")
    assert [e.status for e in ended] == [2, 2, -signal.SIGKILL]
    for e in ended[:2]:
        assert e.text.count("error: ") == 1 and "another rank has ended" in e.text and "Traceback" not in e.text
    ended = run_ranks(4, work_of(recipe), tmp_path / "again")
    assert [e.status for e in ended] == [0] * 4, ended
    assert "resumed after block 1" in ended[0].text
    same(result_of(tmp_path / "2"), expected)


def test_a_rank_that_is_killed_while_scales_are_tuned_leaves_what_one_rank_goes_on_with(tmp_path, tiny_llama):
    case = CASES["tuned"]
    expected = results(run(make(tmp_path / "1", tiny_llama, *case)), "identity")
    recipe = make(tmp_path / "2", tiny_llama, *case)

    def work():
        look = tune._State.look

        def killed(self, divergence):
            if self.done == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            look(self, divergence)

        tune._State.look = killed
        return as_program(work_of(recipe))()

    assert [e.status for e in run_ranks(2, work, tmp_path / "killed")] == [2, -signal.SIGKILL]
    folder = run(recipe)
    same(results(folder, "identity"), expected)
    assert "tune: resumed" in (folder / "run.log").read_text()


def test_more_ranks_than_shares_and_ranks_of_two_minds_are_refused_before_the_work(tmp_path, tiny_llama):
    case = CASES["gptq"]
    few = make(tmp_path / "few", tiny_llama, *case, calibration={"samples": 4, "length": 32, "batch_size": 2})
    ended = run_ranks(3, work_of(few), tmp_path / "out")
    assert all(e.status == 1 and "make 2 shares, too few for 3 ranks" in e.text for e in ended)

    def of_two_minds(world):
        scheme = {"weight": {"bits": 4 - world.rank}}
        run(make(tmp_path / "minds", tiny_llama, scheme, {"gptq": {}}), world=world)

    ended = run_ranks(2, in_world(of_two_minds), tmp_path / "out")
    assert all(e.status == 1 and "rank 1 has another recipe (scheme) than rank 0" in e.text for e in ended)
    assert not (tmp_path / "minds" / "outputs").exists()


def test_a_mistake_is_told_once(tmp_path, tiny_llama):
    recipe = make(tmp_path, tiny_llama, *CASES["gptq"], calibration={"samples": 8, "length": 1 << 20})
    ended = run_ranks(2, as_program(work_of(recipe)), tmp_path / "out")
    assert [e.status for e in ended] == [2, 2]
    assert "calibration.length" in ended[0].text and ended[1].text == ""


def test_ranks_tell_one_another(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.empty(0, 2, dtype=torch.int8)}

    def work(world):
        told = world.broadcast(Message({"from": world.rank}, tensors) if world.rank == 1 else None, 1)
        if told.facts != {"from": 1} or any(not torch.equal(told.tensors[k], t) for k, t in tensors.items()):
            return 1
        if [m.facts for m in world.gather(Message(world.rank))] != [0, 1, 2]:
            return 2
        if [m.facts for m in world.gather(Message(world.rank), 2)] != ([0, 1, 2] if world.rank == 2 else []):
            return 3
        tensor = torch.full((3,), world.rank)
        world.fill(tensor, 2)
        if tensor.tolist() != [2, 2, 2] or bool(world.all(torch.tensor(world.rank != 1))):
            return 4
        rows = torch.arange(7)
        if not torch.equal(in_shares(world, 7, lambda part: (rows[part] * 2,))[0], rows * 2):
            return 5
        if not torch.equal(in_shares(world, 2, lambda part: (rows[part],))[0], rows[:2]):
            return 6
        done = done_by(world, [2, 0, 1, 0], lambda piece: Message([piece, world.rank]))
        if [m.facts for m in done] != [[0, 2], [1, 0], [2, 1], [3, 0]]:
            return 7
        return 0

    assert [e.status for e in run_ranks(3, in_world(work), tmp_path)] == [0, 0, 0]


def test_a_mistake_in_a_piece_of_work_is_raised_on_all_ranks(tmp_path):
    def fails(piece):
        raise UserError(f"piece {piece}")

    ended = run_ranks(2, in_world(lambda world: done_by(world, [1, 0], fails) and None), tmp_path)
    assert all(e.status == 1 and "UserError: piece 0" in e.text for e in ended)
    with pytest.raises(UserError, match="piece 0"):
        done_by(ALONE, [0], fails)
    with pytest.raises(UserError, match="piece 9"):
        led(ALONE, lambda: fails(9))
    agree(ALONE, {"a": 1})


def test_the_most_costly_pieces_of_work_are_shared_out_first():
    assert by_cost([1, 8, 3, 3, 2], 2) == [0, 0, 1, 1, 1]
    assert by_cost([5, 5], 4) == [0, 1]


def test_pieces_that_belong_together_are_shared_out_in_stretches_of_equal_cost():
    assert in_order([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert in_order([1, 1, 1, 1], 4) == [0, 1, 2, 3]
    assert in_order([4, 4, 1, 1], 2) == [0, 1, 1, 1]
    assert in_order([2, 2], 3) == [0, 2]
    assert in_order([0, 0], 2) == [0, 0]


def test_torchrun_starts_the_ranks_of_a_run(tmp_path, tiny_llama):
    options = {
        "model.path": tiny_llama, "calibration.samples": 4, "calibration.length": 32, "calibration.batch_size": 1,
        "evaluation.windows": 2, "evaluation.length": 32, "outputs": tmp_path / "outputs", "store": tmp_path / "store",
    }  # fmt: skip
    words = ["data=docs", *(f"{key}={value}" for key, value in options.items())]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, str(ROOT / "main.py"), "--config", "smollm2-135m_w4a16", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    (environment,) = (tmp_path / "outputs").glob("*/*/environment.json")
    assert json.loads(environment.read_text())["ranks"] == 2
    assert ended.stdout.count("results: ") == 1


def test_ranks_do_not_share_the_points_of_a_sweep(monkeypatch, capsys, tiny_llama):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "-m", f"model.path={tiny_llama}", "scheme.weight.bits=3,4"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["run", "-m", f"model.path={tiny_llama}", "scheme.weight.bits=3,4"]) == 2
    assert "WORLD_SIZE: 'many' is no number of ranks" in capsys.readouterr().err
