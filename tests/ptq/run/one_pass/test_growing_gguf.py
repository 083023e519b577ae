"""A GGUF file that grows by a finished block at a time: the bytes of the one that is written at the end, and never a second copy."""

import os

import pytest

from ptq.errors import UserError
from ptq.run.experiment import run
from ptq.run.kept.kept_pass import RESUME
from tests.tools.interrupted import interrupted
from tests.tools.one_pass import make


def made(folder, model, steps=None, **execution):
    return make(folder, model, steps or {"gptq": {}}, "gguf", **execution)


def file_of(folder):
    return folder / "export" / "gguf" / "model.gguf"


def part_of(folder):
    [part] = (folder / "outputs").rglob(f"{RESUME}/quantize/export.part")
    return part


TURNED = {"rotate": {"online": []}, "gptq": {}}


@pytest.mark.parametrize(("model", "steps"), [("tiny_llama", None), ("tiny_mixtral", None), ("tiny_llama", TURNED)])
def test_the_file_has_the_bytes_of_the_one_that_is_written_at_the_end(tmp_path, request, monkeypatch, model, steps):
    model = request.getfixturevalue(model)
    one = run(made(tmp_path / "one", model, steps))
    codes = run(made(tmp_path / "codes", model, steps, save=True))
    monkeypatch.setattr("ptq.run.experiment.goes_in_one_pass", lambda *args: False)
    several = run(made(tmp_path / "several", model, steps))
    expected = file_of(several).read_bytes()
    assert file_of(one).read_bytes() == expected and file_of(codes).read_bytes() == expected
    assert not list(one.rglob("block-*")) and list(several.rglob("block-*")) and list(codes.rglob("block-*"))
    assert not (one / RESUME).exists()


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_run_killed_after_a_block_goes_on_in_the_same_file(tmp_path, tiny_mixtral, monkeypatch, capsys, blocks):
    steps = TURNED if blocks == 1 else None
    expected = file_of(run(made(tmp_path / "whole", tiny_mixtral, steps))).read_bytes()
    recipe = made(tmp_path / "killed", tiny_mixtral, steps)
    interrupted(monkeypatch, recipe, blocks)
    part = part_of(tmp_path / "killed")
    before, held = part.stat(), sum(file.stat().st_size for file in part.parent.glob("block-*"))
    assert held < before.st_size, "what lies beside it are figures, no tensors"
    capsys.readouterr()
    file = file_of(run(recipe))
    assert f"resumed after block {blocks} of 3" in capsys.readouterr().out
    assert file.read_bytes() == expected
    assert file.stat().st_ino == before.st_ino, "no byte of it was copied"


def test_a_run_killed_in_the_export_ends_with_the_file(tmp_path, tiny_llama, monkeypatch, capsys):
    import ptq.export.packing.gguf_file as gguf_file

    expected = file_of(run(made(tmp_path / "whole", tiny_llama))).read_bytes()
    recipe = made(tmp_path / "full", tiny_llama)

    def full(path, write):
        raise UserError(f"{path}: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "write_atomic", full)
        with pytest.raises(UserError, match=r"model\.gguf: the disk is full"):
            run(recipe)
    assert not list((tmp_path / "full").rglob("model.gguf"))
    capsys.readouterr()
    assert file_of(run(recipe)).read_bytes() == expected
    out = capsys.readouterr().out
    assert "finished before" not in out and "resumed after block 4 of 4" in out


@pytest.mark.parametrize("damage", ["a byte", "the end"])
def test_blocks_that_are_not_whole_are_made_again(tmp_path, tiny_llama, monkeypatch, capsys, damage):
    expected = file_of(run(made(tmp_path / "whole", tiny_llama))).read_bytes()
    recipe = made(tmp_path / "killed", tiny_llama)
    interrupted(monkeypatch, recipe, 3)
    part = part_of(tmp_path / "killed")
    size = part.stat().st_size
    if damage == "the end":
        os.truncate(part, size - 64)
    else:
        with part.open("r+b") as file:
            file.seek(size - 4096)
            byte = file.read(1)
            file.seek(size - 4096)
            file.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    assert file_of(run(recipe)).read_bytes() == expected
    assert "resumed after block 2 of 4" in capsys.readouterr().out, "the block before it is whole"


def test_a_disk_that_is_full_in_the_middle_is_said(tmp_path, tiny_llama, monkeypatch, capsys):
    import ptq.export.packing.gguf_file as gguf_file

    recipe, put, done = made(tmp_path, tiny_llama), gguf_file._put, []

    def full(handle, place, data):
        done.append(place)
        if len(done) == 15:
            raise OSError(28, "No space left on device")
        put(handle, place, data)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_put", full)
        with pytest.raises(UserError, match="export.part: the disk is full"):
            run(recipe)
    capsys.readouterr()
    assert file_of(run(recipe)).is_file()
    assert "resumed after block 1 of 4" in capsys.readouterr().out


def test_what_the_format_cannot_hold_is_refused_before_the_work(tmp_path, tiny_llama):
    recipe = made(tmp_path, tiny_llama)
    recipe.scheme.weight.__dict__["group_size"] = 16
    with pytest.raises(UserError, match=r"scheme.weight.group_size: 16 .* is no multiple of gguf's 32"):
        run(recipe)
    assert not list(tmp_path.rglob("export.part"))
