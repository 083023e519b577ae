"""Corrections of low rank are exported as an adapter beside the quantized model, which PEFT adds to it, or refused by name."""

import importlib.util
import json
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.config.schema import ExportConfig
from ptq.errors import UserError
from ptq.export.registry import shipped
from ptq.run.experiment import dry_run, run, run_recipe
from ptq.run.exports import export_run
from tests.tools.tiny_runs import tiny_recipe

peft = pytest.importorskip("peft")
pytest.importorskip("compressed_tensors")

IDS = (torch.arange(1, 97) * 7 % 250)[None]
GROUPS = {"bits": 3, "granularity": "group", "group_size": 32, "symmetric": False}
CHANNEL = {"bits": 4, "granularity": "channel"}
FP8 = {"format": "fp8_e4m3", "bits": 8, "granularity": "channel"}
FOLDER = {"format": "compressed-tensors"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def reloaded(folder, dequantize=True):
    """The quantized model of an exported folder."""
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def adapted(model, folder):
    """The model with the adapter that lies in an exported folder, whose every tensor has found its Linear."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, folder / "adapter")


def corrected(place, model, weight, rank=4, **changes):
    scheme = changes.pop("scheme", {"weight": weight})
    steps = changes.pop("steps", {"lowrank": {"rank": rank}})
    here = {"execution": {"device": "cpu", **changes.pop("execution", {})}}
    return tiny_recipe(place, model, scheme, steps, **{"export": FOLDER, **here, **changes})


@pytest.mark.parametrize(
    ("weight", "rank", "dequantize"), [(GROUPS, 4, True), (CHANNEL, 4, False), (CHANNEL, 100, True), (FP8, 4, False)]
)
def test_the_folder_with_its_adapter_gives_the_logits_of_the_simulated_model(
    tmp_path, tiny_llama, weight, rank, dequantize
):
    result = run_recipe(corrected(tmp_path, tiny_llama, weight, rank))
    expected = logits(result.model)
    folder = result.folder / "export" / "compressed-tensors"
    model = reloaded(folder, dequantize)
    plain = logits(model)
    assert (logits(adapted(model, folder)) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2
    config = json.loads((folder / "adapter" / CONFIG).read_text())
    stored = load_file(folder / "adapter" / WEIGHTS)
    # The keys and values of this model have 64 rows, and so no more ranks.
    ranks = {name: len(tensor) for name, tensor in stored.items() if "lora_A" in name}
    assert set(ranks.values()) == ({4} if rank == 4 else {64, 100})
    assert config["lora_alpha"] == config["r"] == max(ranks.values())
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert "PeftModel.from_pretrained(model, folder + '/adapter')" in (result.folder / "run.log").read_text()


def test_the_adapter_is_the_same_from_memory_from_disk_and_from_a_finished_run(tmp_path, tiny_llama):
    scheme = {
        "weight": CHANNEL,
        "overrides": [{"modules": name, "tensors": {"weight": None}} for name in ("*.down_proj", "*.1.*")],
    }
    rotated = {"rotate": {"online": []}, "lowrank": {"rank": 4}}
    first = run(corrected(tmp_path, tiny_llama, CHANNEL, scheme=scheme, steps=rotated, execution={"save": True}))
    exported = first / "export" / "compressed-tensors"
    again = export_run(first, ExportConfig("compressed-tensors"), tmp_path / "again", False).path
    offloaded = corrected(tmp_path / "other", tiny_llama, CHANNEL, scheme=scheme, steps=rotated)
    disk = run(recipe_from({**offloaded.as_dict(), "execution": {"weights": "offloaded"}}))
    for place in (again, disk / "export" / "compressed-tensors"):
        for file in (CONFIG, WEIGHTS):
            assert (place / "adapter" / file).read_bytes() == (exported / "adapter" / file).read_bytes()
    found = json.loads((exported / "adapter" / CONFIG).read_text())["target_modules"]
    assert found == sorted(found) and len(found) == 3 * 6
    assert not any("down_proj" in name or ".1." in name for name in found)


def test_offloaded_blocks_that_are_kept_one_by_one_have_their_corrections(tmp_path, tiny_llama):
    resident = run(corrected(tmp_path, tiny_llama, GROUPS)) / "export" / "compressed-tensors"
    recipe = corrected(tmp_path / "other", tiny_llama, GROUPS, execution={"weights": "offloaded"})
    offloaded = run(recipe) / "export" / "compressed-tensors"
    for file in ("model.safetensors", f"adapter/{WEIGHTS}", f"adapter/{CONFIG}"):
        assert (offloaded / file).read_bytes() == (resident / file).read_bytes()


@pytest.mark.parametrize("name", sorted(set(shipped()) - {"compressed-tensors"}))
def test_a_format_without_a_place_for_it_is_refused_before_the_work_with_one_that_has_it(tmp_path, tiny_llama, name):
    group = {"bits": 8, "granularity": "group", "group_size": 64}
    with pytest.raises(UserError, match=rf"export.format: {name} has no place .* steps.lowrank") as error:
        dry_run(corrected(tmp_path, tiny_llama, group, export={"format": name}))
    [advice] = re.findall(r"use export=(\S+) \(an adapter for PEFT\)", str(error.value))
    dry_run(corrected(tmp_path, tiny_llama, group, export={"format": advice}))


def test_a_finished_run_is_not_exported_without_what_corrects_it(tmp_path, tiny_llama, capsys):
    folder = run(corrected(tmp_path, tiny_llama, GROUPS, execution={"save": True}, export=None))
    capsys.readouterr()
    assert main(["export", "--run", str(folder), "--format", "gguf"]) == 2
    assert "export.format: gguf has no place for the products of low rank" in capsys.readouterr().err
    assert not (folder / "export").exists()


def test_inputs_that_are_rounded_and_experts_are_refused_before_the_work(tmp_path, tiny_llama, tiny_mixtral):
    token = {"bits": 8, "granularity": "token", "dynamic": True}
    with pytest.raises(
        UserError, match=r"scheme.input: quantized for model.layers.0.*use scheme.input=null, or"
    ) as error:
        dry_run(corrected(tmp_path, tiny_llama, CHANNEL, scheme={"weight": CHANNEL, "input": token}))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"export: model.layers.0.* is an expert's.*exclude the experts"):
        dry_run(corrected(tmp_path, tiny_mixtral, CHANNEL))


def test_without_peft_the_step_is_refused_with_what_to_install(tmp_path, tiny_llama, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(
        UserError, match=r"needs a package that is not there \(peft\): pip install 'ptq-framework\[export\]'"
    ):
        dry_run(corrected(tmp_path, tiny_llama, CHANNEL))
    dry_run(tiny_recipe(tmp_path, tiny_llama, {"weight": CHANNEL}, {"rtn": {}}, export=FOLDER))


@pytest.mark.parametrize("weights", ["resident", "offloaded"])
@pytest.mark.parametrize("name", ["gguf", "compressed-tensors"])
def test_what_a_method_corrects_without_saying_so_is_never_lost(tmp_path, tiny_llama, name, weights):
    group = {"bits": 8, "granularity": "group", "group_size": 32}
    steps = {"mine": {"_target_": "tests.methods.unsaid_correction.Step", "rank": 4}}
    recipe = corrected(
        tmp_path, tiny_llama, group, steps=steps, export={"format": name}, execution={"weights": weights}
    )
    if (name, weights) == ("compressed-tensors", "resident"):
        assert (run(recipe) / "export" / name / "adapter" / WEIGHTS).is_file()
        return
    with pytest.raises(UserError, match="export: a step has added a product of low rank to model.layers.0"):
        run(recipe)
