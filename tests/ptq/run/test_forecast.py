"""The dry run's table: what each phase takes, for a model of which there is a config.json alone, in little time and memory."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import transformers

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.footprint.passes import block_flops, trace_shapes
from ptq.network.skeleton import skeleton
from ptq.run.experiment import run
from ptq.run.forecast.machine_speed import MachineSpeed, measured
from ptq.run.forecast.work_estimate import work_of
from ptq.steps._registry import build_steps
from ptq.testing import BYTE_VOCABULARY

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent
SPEED = MachineSpeed(1e12, 1e5, 1e9, 5e8)


def made(folder, kind, **sizes):
    config = transformers.AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(folder)
    return folder


def prepared(folder, steps, **changes):
    base = {"name": "forecast", "model": {"path": str(folder)}, "scheme": {"weight": {"bits": 4}}, "steps": steps}
    recipe = recipe_from({**base, "execution": {"device": "cpu"}, **changes})
    return recipe, skeleton(recipe.model, weights=False), build_steps(recipe.steps)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return made(
        tmp_path_factory.mktemp("mixture"), "qwen3_moe", hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        vocab_size=BYTE_VOCABULARY, mlp_only_layers=[0],
    )  # fmt: skip


def test_blocks_that_are_alike_are_run_once_and_count_as_if_all_had_been(mixture):
    network = skeleton(prepared(mixture, {"rtn": {}})[0].model, weights=False)
    found = block_flops(network, 48)
    whole = trace_shapes(network, 48).prefill
    assert sum(found.blocks.values()) + found.head == whole.total - whole.other
    assert len(set(found.blocks.values())) == 2 and all(found.blocks.values())
    assert list(found.chosen.values()) == [0.0] + [2.0] * 5


def test_what_is_read_and_computed_follows_the_recipe(mixture):
    size = 1_000_000

    def work(steps, **changes):
        return work_of(*prepared(mixture, steps, **changes), size, 4)

    resident, offloaded = work({"gptq": {}}), work({"gptq": {}}, execution={"device": "cpu", "weights": "offloaded"})
    assert resident["load"].read == size and resident["baseline"].read == 0
    assert offloaded["load"].read == offloaded["baseline"].read == 0 and offloaded["quantize"].read == size
    planned = work({"rotate": {"seeds": 2}, "gptq": {}}, execution={"device": "cpu", "weights": "offloaded"})
    assert all(planned[phase].read == size for phase in ("load", "links", "baseline", "quantize"))
    by_block = work({"smooth": {}, "gptq": {}}, execution={"device": "cpu", "weights": "offloaded"})
    assert by_block["calibration"].read == by_block["load"].read == 0 and by_block["quantize"].read == size
    assert offloaded["quantize"].products > resident["quantize"].products
    assert "calibration" in work({"smooth": {}, "rtn": {}}) and "calibration" not in resident
    nearest = work({"rtn": {}})["quantize"]
    assert nearest.columns == 0 and nearest.products < resident["quantize"].products
    twice = work({"gptq": {}}, calibration={"samples": 128})
    assert twice["baseline"] == resident["baseline"]
    assert resident["quantize"].products < twice["quantize"].products < 2 * resident["quantize"].products
    everyone = work({"gptq": {}}, calibration={"experts": "all"})
    assert everyone["quantize"].products > resident["quantize"].products
    exported = work({"gptq": {}}, export={"format": "compressed-tensors"})["export"]
    assert exported.written > 0 and not exported.shared
    tuned = [work({"gptq": {}, "tune": {"steps": n, "batch": 1}})["tune"].products for n in (0, 100, 200)]
    assert 0 < tuned[0] < tuned[1] and tuned[2] - tuned[1] == pytest.approx(
        100 / (100 + 8 * 4 / 3) * (tuned[1] - tuned[0]), rel=0.2
    )
    assert resident["quantize"].seconds(SPEED, 4) < resident["quantize"].seconds(SPEED)
    assert exported.seconds(SPEED, 4) == exported.seconds(SPEED)


def test_the_seconds_are_those_of_the_machine_within_a_small_factor(tmp_path, tiny_llama):
    changes = {
        "calibration": {"samples": 32, "length": 128}, "evaluation": {"windows": 8, "length": 128},
        "outputs": str(tmp_path / "o"), "store": str(tmp_path / "s"),
    }  # fmt: skip
    recipe, network, steps = prepared(tiny_llama, {"gptq": {}}, **changes)
    speed = measured(torch.device("cpu"), torch.float32, tmp_path)
    expected = work_of(recipe, network, steps, 1 << 20, 4)["quantize"].seconds(speed)
    took = json.loads((run(recipe) / "metrics.json").read_text())["seconds"]["quantize"]
    # A tiny model's time goes into Python, which is not counted: never more than that is promised, by much.
    assert expected < 5 * took
    assert not list(tmp_path.glob(".speed*"))


def test_a_dry_run_needs_a_config_alone(tmp_path, mixture, capsys):
    words = [
        f"model.path={mixture}",
        f"outputs={tmp_path / 'o'}",
        f"store={tmp_path / 's'}",
        "scheme.weight.group_size=32",
    ]
    assert main(["run", "--config", "mixtral-8x7b_w4a16", *words, "data=docs", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "what a run will take" in said and "has no weights here" in said and "not tokenized" in said
    assert all(re.search(rf"{phase} .*\d", said) for phase in ("load", "baseline", "quantize", "evaluate", "in all"))
    assert main(["run", "--config", "mixtral-8x7b_w4a16", *words, "data=docs"]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err


def test_the_dry_run_of_a_mixture_of_671_billion_parameters_takes_seconds_and_little_memory(tmp_path):
    folder = made(tmp_path / "model", "deepseek_v3")
    program = (
        "import time; from ptq.cli.app import main; from ptq.run.record.peak_memory import resident_peak; "
        f"main(['run', '--config', 'mixtral-8x7b_w4a16', 'model.path={folder}', 'data=docs', '--dry-run', "
        f"'store={tmp_path / 's'}', 'outputs={tmp_path / 'o'}', 'execution.weights=offloaded', 'model.dtype=bfloat16']); "
        "print(time.process_time(), resident_peak() / 2**30)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    seconds, memory = map(float, ended.stdout.splitlines()[-1].split())
    assert "what a run will take" in ended.stdout, ended.stderr
    assert seconds < 30 and memory < 1.5
