"""Exports of whole runs: refused before the work, written after it, or later from the saved codes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.config.schema import ExportConfig, SchemeConfig
from ptq.errors import UserError
from ptq.inspect.q8_readers import open_llama2c
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.network import build_network, weight_of
from ptq.run.experiment import dry_run, run
from ptq.run.exports import SavedSource, export_run
from ptq.run.kept.block_file import write_block
from ptq.testing import random_tiny

GROUPS = {"bits": 8, "granularity": "group", "group_size": 64}
Q8 = {"weight": GROUPS, "input": {**GROUPS, "dynamic": True}}


@pytest.fixture
def recipe(tmp_path, tiny_llama_eps):
    """A quick recipe that exports to llama2.c."""

    def make(**changes):
        base = {
            "name": "tiny",
            "model": {"path": str(tiny_llama_eps)},
            "calibration": {"samples": 2, "length": 64},
            "evaluation": {"windows": 2, "length": 128},
            "scheme": Q8,
            "steps": {"rtn": {}},
            "export": {"format": "llama2c"},
            "outputs": str(tmp_path / "outputs"),
            "store": str(tmp_path / "store"),
        }
        return recipe_from({**base, **changes})

    return make


def test_a_run_exports_at_its_end_offloaded_or_not_and_a_finished_run_gives_the_same_bytes(recipe, tmp_path, capsys):
    folder = run(recipe(execution={"save": True}))
    first = (folder / "export" / "llama2c" / "model.bin").read_bytes()
    assert (folder / "export" / "llama2c" / "tokenizer.bin").is_file()
    offloaded = run(recipe(execution={"weights": "offloaded"}))
    assert (offloaded / "export" / "llama2c" / "model.bin").read_bytes() == first
    arguments = ["export", "--run", str(folder), "--format", "llama2c"]
    assert main([*arguments, "--output", str(tmp_path / "again" / "m.bin"), "tokenizer=false"]) == 0
    assert (tmp_path / "again" / "m.bin").read_bytes() == first
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["m.bin"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "add --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    header = open_llama2c(folder / "export" / "llama2c" / "model.bin").header
    assert (header.dim, header.hidden_dim, header.group_size, header.shared) == (128, 320, 64, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": {"weight": {"bits": 4}}}, "scheme.weight.bits: 4"),
        ({"export": {"format": "lama2c"}}, "did you mean 'llama2c'"),
        ({"export": {"format": "llama2c", "options": {"tokenzier": True}}}, "export.options.tokenzier"),
        ({"export": {"format": "kuiper", "options": {"build": "llama3"}}}, "rope_theta"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_work(recipe, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(BlockStream, "run", lambda *a, **k: pytest.fail("work was begun"))
    for action in (run, dry_run):
        with pytest.raises(UserError, match=words):
            action(recipe(**changes))
    assert not list(tmp_path.rglob("recipe.yaml"))


def test_what_a_runtime_computes_otherwise_is_said_before_the_work(recipe, tiny_opt, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    scheme = {"weight": {"bits": 8}, "input": {"granularity": "token", "dynamic": True}}
    opt = recipe(model={"path": str(tiny_opt)}, scheme=scheme, export={"format": "compressed-tensors"})
    dry_run(opt)
    assert "export: this model hands fc1, fc2 (tokens, channels)" in capsys.readouterr().out
    monkeypatch.setattr(BlockStream, "run", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(pytest.fail.Exception, match="work was begun"):
        run(opt)
    assert "export: this model hands fc1, fc2 (tokens, channels)" in capsys.readouterr().out


def test_a_finished_run_that_cannot_be_exported_says_why(recipe, tmp_path, tiny_llama_outliers):
    config = ExportConfig("llama2c")
    with pytest.raises(UserError, match="holds no finished run"):
        export_run(tmp_path, config, None, False)
    folder = run(recipe(export=None))
    with pytest.raises(UserError, match="execution.save=true"):
        export_run(folder, config, None, False)
    folder = run(recipe(export=None, execution={"save": True}))
    saved = folder / "quantized" / "block-00001.safetensors"
    content = saved.read_bytes()
    saved.write_bytes(content[:-1])
    with pytest.raises(UserError, match="block-00001.safetensors is missing or damaged"):
        export_run(folder, config, None, False)
    saved.write_bytes(content)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(str(recipe().model.path), str(tiny_llama_outliers)))
    with pytest.raises(UserError, match="holds other weights"):
        export_run(folder, config, None, False)
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"scheme\.input.*use scheme=w8a16_g64 .*: a finished run keeps its scheme"):
        export_run(folder, dataclasses.replace(config, format="kuiper"), None, False)
    assert not (folder / "export").exists() or not list((folder / "export").rglob("*.bin"))


@pytest.mark.parametrize(("name", "square"), [("attn.c_proj", True), ("mlp.c_fc", False)])
def test_a_conv1d_comes_back_from_saved_blocks_the_way_it_was_square_or_not(tmp_path, name, square):
    network, name = build_network(random_tiny("gpt2")), f"transformer.h.0.{name}"
    rows, columns = network.shapes[name]
    assert (rows == columns) is square
    for block in network.blocks:
        write_block(block, tmp_path / f"block-{block.index:05d}.safetensors", {})
    loaded = SimpleNamespace(tokenizer=None, weights=ResidentWeights(), location=SimpleNamespace(gguf=None, base=""))
    recipe = SimpleNamespace(scheme=SchemeConfig())
    source = SavedSource(SimpleNamespace(network=network, loaded=loaded, recipe=recipe), tmp_path)
    assert torch.equal(source.linear(name).weight, weight_of(network.model.get_submodule(name)))
