"""Models whose residual stream was turned for good are exported like any other: what lies outside the blocks is turned too."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptq.bench.sides import saved_model
from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.config.schema import ExportConfig
from ptq.errors import UserError
from ptq.models.loading import load
from ptq.run.experiment import dry_run, run, run_recipe
from ptq.run.exports import export_run
from ptq.testing import random_tiny
from tests.tools.tiny_runs import saved

IDS = (torch.arange(1, 97) * 7 % 250)[None]


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """A quick recipe that turns the stream, rounds to nearest and exports."""

    def make(**changes):
        base = {
            "name": "tiny",
            "model": {"path": str(tiny_llama)},
            "calibration": {"samples": 2, "length": 64},
            "evaluation": {"windows": 2, "length": 128},
            "scheme": {"weight": {"bits": 8, "granularity": "channel"}},
            "steps": {"rotate": {"online": []}, "rtn": {}},
            "export": {"format": "compressed-tensors"},
            "outputs": str(tmp_path / "outputs"),
            "store": str(tmp_path / "store"),
        }
        return recipe_from({**base, **changes})

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def near(found, expected):
    """Whether logits are equal but for the scales, which the package keeps in 16 bits."""
    return bool((found - expected).abs().max() < 0.02 * expected.std())


def test_a_turned_model_comes_back_from_memory_from_disk_and_from_its_finished_run(
    recipe, tmp_path, tiny_llama, capsys
):
    pytest.importorskip("compressed_tensors")
    result = run_recipe(recipe(execution={"save": True}))
    expected = logits(result.model)
    exported = result.folder / "export" / "compressed-tensors"
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert not loaded.config.tie_word_embeddings
    assert "embedding and head, which steps.rotate has turned, are stored in fp16" in capsys.readouterr().out
    stored = load_file(exported / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == stored["lm_head.weight"].dtype == torch.float16
    assert near(logits(loaded), expected)
    assert near(expected, logits(AutoModelForCausalLM.from_pretrained(tiny_llama)))
    again = export_run(result.folder, ExportConfig("compressed-tensors"), tmp_path / "again", False).path
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(loaded))
    offloaded = run(recipe(execution={"weights": "offloaded"})) / "export" / "compressed-tensors"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(offloaded)), logits(loaded))


def test_what_is_turned_online_is_refused_of_a_saved_run_too(recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = random_tiny("gemma3")
    model.resize_token_embeddings(258)
    saved(model, tmp_path / "gemma3")
    folder = run(
        recipe(
            model={"path": str(tmp_path / "gemma3")},
            export=None,
            execution={"save": True},
            evaluation={"windows": 2, "length": 32},
            data={"allow_overlap": True},
        )
    )
    with pytest.raises(UserError, match=r"OnlineHadamard at model.layers.0.post_\w+.\w+, which no format can hold"):
        export_run(folder, ExportConfig("compressed-tensors"), None, False)
    assert not list((folder / "export").rglob("*.*"))


def test_a_gguf_file_of_a_turned_model_has_a_head_of_its_own(recipe):
    gguf = pytest.importorskip("gguf")
    folder = run(
        recipe(scheme={"weight": {"bits": 8, "granularity": "group", "group_size": 32}}, export={"format": "gguf"})
    )
    [path] = (folder / "export" / "gguf").iterdir()
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert {"output.weight", "token_embd.weight", "output_norm.weight"} <= names


def test_a_step_after_it_is_saved_as_it_left_the_blocks(recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    steps = {"rotate": {"online": []}, "gptq": {}, "tune": {"steps": 2, "batch": 1, "held_out": 2}}
    made = recipe(steps=steps, execution={"save": True}, calibration={"samples": 2, "length": 64, "tuning_samples": 4})
    result = run_recipe(made)
    again = export_run(result.folder, ExportConfig("compressed-tensors"), tmp_path / "again", False).path
    assert near(logits(AutoModelForCausalLM.from_pretrained(again)), logits(result.model))


def test_a_bench_of_a_turned_run_has_the_runs_model_or_says_what_is_damaged(recipe):
    made = recipe(export=None, execution={"save": True})
    result = run_recipe(made)
    model = load(made.model, made.execution).model
    assert near(logits(saved_model(model, made.scheme, result.folder)), logits(result.model))
    (result.folder / "quantized" / "outside.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"--run: .*outside.safetensors cannot be used .*: run it again"):
        saved_model(load(made.model, made.execution).model, made.scheme, result.folder)


def test_a_run_that_kept_nothing_outside_its_blocks_is_refused(recipe, tmp_path):
    folder = run(recipe(export=None, execution={"save": True}))
    outside = folder / "quantized" / "outside.safetensors"
    content = outside.read_bytes()
    outside.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"outside.safetensors is missing or damaged .*: run it again"):
        export_run(folder, ExportConfig("compressed-tensors"), tmp_path / "out", False)
    outside.unlink()
    with pytest.raises(UserError, match=r"kept nothing of what steps.rotate did outside the blocks: run it again"):
        export_run(folder, ExportConfig("compressed-tensors"), tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_what_is_turned_online_is_refused_by_name_before_the_work_and_for_a_finished_run(recipe, tmp_path, capsys):
    steps = {"rotate": {"online": ["down"]}, "rtn": {}}
    with pytest.raises(
        UserError, match=r"compressed-tensors has no place for what steps.rotate does at the input: use"
    ):
        dry_run(recipe(steps=steps))
    folder = run(recipe(steps=steps, export=None, execution={"save": True}))
    arguments = ["export", "--run", str(folder), "--format", "compressed-tensors", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "no place for what steps.rotate does at the input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("opt", "makes an RMSNorm of model.decoder.final_layer_norm"), ("gemma3", "turns online what .* adds to the residual")],
)  # fmt: skip
def test_models_that_rotation_leaves_no_architecture_for_are_refused(recipe, tmp_path, tiny_llama, architecture, why):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / architecture
    model = random_tiny(architecture)
    model.resize_token_embeddings(260, mean_resizing=False)  # as many as the tokenizer knows
    model.save_pretrained(folder)
    changes = {"calibration": {"samples": 2, "length": 32}, "evaluation": {"windows": 2, "length": 64}}
    made = recipe(model={"path": str(folder), "tokenizer": str(tiny_llama)}, **changes)
    with pytest.raises(UserError, match=f"{why}.*: use export=null, or ~steps.rotate"):
        run(made)
    assert not list(tmp_path.rglob("metrics.json"))
