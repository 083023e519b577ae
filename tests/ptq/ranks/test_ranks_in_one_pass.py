"""Several ranks in one pass over a checkpoint: each rank reads a tensor once, and the export has the bytes that one rank writes."""

import dataclasses
import signal

import pytest

from ptq.ranks.world import ALONE
from ptq.run.experiment import run
from ptq.run.kept.kept_pass import RESUME
from tests.tools.one_pass import counted_reads, make, name_at
from tests.tools.ranks import in_world, killed_after, run_ranks
from tests.tools.same_bits import results

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("one_thread", "every_block")

CASES = {
    "searched": ("tiny_llama", {"smooth": {}, "gptq": {"target": "residual", "held_out": 4}}, "compressed-tensors"),
    "turned": ("tiny_llama", {"rotate": {"online": []}, "gptq": {}}, "gguf"),
    "mixture": ("tiny_mixtral", {"awq": {}, "gptq": {}}, "gguf"),
}


def recipe_of(folder, model, steps, export):
    # Processes that are forked may not begin CUDA.
    recipe = make(folder, model, steps, export, device="cpu")
    # In batches of two: shares for three ranks.
    return dataclasses.replace(recipe, calibration=dataclasses.replace(recipe.calibration, samples=6))


def files_of(folder):
    """Returns the bytes of every file of the export, and the figures and codes of the run's results."""
    (found,) = (folder / "outputs").rglob("metrics.json")
    export = found.parent / "export"
    files = {str(path.relative_to(export)): path.read_bytes() for path in export.rglob("*") if path.is_file()}
    return files, results(found.parent)


def counting(work, model):
    """Returns work that fails where this process reads a block's tensor more than once."""

    def counted():
        read = counted_reads(pytest.MonkeyPatch())
        status = work()
        blocks = {place: count for place, count in read.items() if "layers" in name_at(model, place)}
        assert len(blocks) > 20 and set(blocks.values()) == {1}, blocks
        return status

    return counted


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_read_each_tensor_once_and_write_the_export_of_one(tmp_path, request, case):
    name, steps, export = CASES[case]
    model = request.getfixturevalue(name)

    def work_of(folder, world=ALONE):
        return run(recipe_of(tmp_path / folder, model, steps, export), world=world) and None

    work_of("1")
    work = counting(in_world(lambda world: work_of("2", world)), model)
    ended = run_ranks(2, work, tmp_path / "out")
    assert [e.status for e in ended] == [0, 0], ended
    assert files_of(tmp_path / "2") == files_of(tmp_path / "1")
    assert not list((tmp_path / "2").rglob(RESUME)) and not list((tmp_path / "2" / "outputs").rglob("block-*"))


def test_a_killed_rank_leaves_what_any_number_of_ranks_goes_on_with(tmp_path, tiny_mixtral):
    _, steps, export = CASES["mixture"]
    run(recipe_of(tmp_path / "1", tiny_mixtral, steps, export))
    recipe = recipe_of(tmp_path / "2", tiny_mixtral, steps, export)
    work = in_world(lambda world: run(recipe, world=world) and None)
    ended = run_ranks(2, killed_after(work, 1, 2), tmp_path / "killed")
    assert [e.status for e in ended] == [2, -signal.SIGKILL], ended
    assert ended[0].text.count("error: ") == 1 and "another rank has ended" in ended[0].text
    ended = run_ranks(3, work, tmp_path / "again")
    assert [e.status for e in ended] == [0] * 3, ended
    assert "resumed after block" in ended[0].text
    assert files_of(tmp_path / "2") == files_of(tmp_path / "1")
