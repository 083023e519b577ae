"""The benchmark: sides in turn, a report with every figure, refusals before the work."""

import copy
import dataclasses
import json
import re

import pytest
import torch
import transformers
from safetensors import safe_open

from ptq.bench.against import torch_qint8
from ptq.bench.benchmark import Tasks, bench
from ptq.bench.energy import joules_a_token, meter_of
from ptq.bench.loading import loading
from ptq.bench.roofline import Roofline
from ptq.bench.sides import competitors, saved_model, sides_of
from ptq.bench.timing import in_turn
from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.integrations.transformers import PtqConfig
from ptq.models.loading import load
from ptq.run.experiment import run
from ptq.run.in_memory import quantize
from quantize.kernels.choice import Choice
from quantize.modules.simulated import QuantLinear
from quantize.spec.quant_spec import QuantSpec

QUICK = Tasks(prefill=(8,), decode=2, batches=(1, 2), rounds=1, loading=False)
TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}


@pytest.fixture(autouse=True)
def own_timings(monkeypatch, tmp_path):
    monkeypatch.setattr("ptq.files.kernel_timings.DEFAULT_FOLDER", str(tmp_path / "timings"))
    small = Roofline({"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, 1e9)
    monkeypatch.setattr("ptq.bench.benchmark.measured", lambda device: small)


def recipe_of(path, scheme):
    return recipe_from({"name": "speed", "model": {"path": str(path)}, "scheme": scheme, "steps": {"rtn": {}}})


@pytest.mark.usefixtures("drawn")
def test_every_side_is_measured_in_every_task_and_the_files_say_so(tiny_llama, tmp_path):
    recipe = recipe_of(tiny_llama, {"weight": {"bits": 8}, "input": TOKEN})
    folder = bench(recipe, QUICK, tmp_path / "bench", say=lambda line: None)
    report = json.loads((folder / "bench.json").read_text())
    sides = ["fp32", "bf16", "simulated", "kernels"]
    tasks = ["prefill 8", "first token", "decode 2 x 1", "decode 2 x 2"]
    assert [(f["task"], f["side"]) for f in report["figures"]] == [(t, s) for t in tasks for s in sides]
    assert all(f["median"] > 0 and f["least"] <= f["ratio"] <= f["most"] for f in report["figures"])
    assert "28 Linears: integer" in report["sides"]["kernels"]["note"]
    quarter = report["sides"]["fp32"]["weight_bytes"] / 4
    assert quarter < report["sides"]["kernels"]["weight_bytes"] < 1.2 * quarter
    assert 0.8 < report["sides"]["kernels"]["read_over_weights"] <= 1 == report["sides"]["fp32"]["read_over_weights"]
    # A kernel that is alone, as on CPUs without VNNI, is not timed.
    able, _ = Choice().candidates(QuantSpec(bits=8), QuantSpec(**TOKEN), (64, 64), torch.device("cpu"))
    timed = {1, 2, 8} if len(able) > 1 else set()
    assert {row["rows"] for row in report["linears"]} >= timed and all(row["least"] > 0 for row in report["linears"])
    assert report["sides"]["fp32"]["head_bytes"] == 2 * report["sides"]["bf16"]["head_bytes"] > 0
    table = (folder / "bench.md").read_text()
    assert "| prefill 8 | kernels |" in table and "10^9 operations a second" in table
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_loading_is_measured_in_processes_of_their_own(tiny_llama, tmp_path):
    model = tmp_path / "model"
    ptq_config = PtqConfig(scheme="w8a8")
    transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=ptq_config).save_pretrained(model)
    found = loading(model, "float32", torch.device("cpu"))
    assert found["seconds"] > 0 and found["peak_bytes"] > 1e8
    with pytest.raises(UserError, match="bench: loading .* failed: "):
        loading(tmp_path / "nothing", "float32", torch.device("cpu"))


def test_schemes_with_static_inputs_are_measured_too(tiny_llama, tmp_path):
    recipe = recipe_of(tiny_llama, {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor"}})
    tasks = Tasks(prefill=(8,), decode=0, rounds=1, loading=False, against=("torch-qint8",))
    report = json.loads((bench(recipe, tasks, tmp_path, say=lambda line: None) / "bench.json").read_text())
    assert re.search(r"28 Linears: (integer|int_mm) \(not packed\)", report["sides"]["kernels"]["note"])
    assert {f["side"] for f in report["figures"]} == {"fp32", "bf16", "simulated", "kernels", "torch-qint8"}


@pytest.fixture
def run_of_ones_own(tiny_llama, tmp_path):
    """A finished run that has saved its codes: GPTQ's, which differ from those that are nearest."""
    recipe = recipe_from(
        {
            "name": "own", "model": {"path": str(tiny_llama)}, "scheme": {"weight": {"bits": 4}, "input": TOKEN},
            "steps": {"gptq": {}}, "execution": {"save": True}, "outputs": str(tmp_path / "out"), "store": str(tmp_path / "store"),
            "calibration": {"samples": 8, "length": 32}, "evaluation": {"windows": 2, "length": 32},
        }
    )  # fmt: skip
    return recipe, run(recipe)


def test_a_finished_run_is_measured_with_its_own_codes(run_of_ones_own, tmp_path):
    recipe, folder = run_of_ones_own
    model = load(recipe.model, recipe.execution).model
    own, nearest = copy.deepcopy(model), copy.deepcopy(model)
    saved_model(own, recipe.scheme, folder)
    quantize(nearest, recipe.scheme, {"rtn": {}}, None)
    mine, theirs = (
        {name: m for name, m in found.named_modules() if isinstance(m, QuantLinear)} for found in (own, nearest)
    )
    with safe_open(folder / "quantized" / "block-00000.safetensors", framework="pt") as file:
        first = next(name for name in mine if f"{name}.codes" in file.keys())  # noqa: SIM118
        assert torch.equal(file.get_tensor(f"{first}.codes"), mine[first].codes)
    assert any(not torch.equal(m.codes, theirs[name].codes) for name, m in mine.items())
    assert main(["bench", "--run", str(folder), "--prefill", "8", "--decode", "2", "--batches", "1", "--rounds", "1",
                 "--no-loading", "--output", str(tmp_path / "bench")]) == 0  # fmt: skip
    report = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert report["sides"]["simulated"]["note"] == "the run's own codes"
    (folder / "quantized" / "block-00001.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="--run: .*block-00001.safetensors cannot be used .*: run it again"):
        saved_model(model, recipe.scheme, folder)


def test_head_and_embedding_are_packed_where_asked_for_and_the_step_is_divided(tiny_llama, tmp_path):
    recipe = recipe_of(tiny_llama, {"weight": {"bits": 8}, "input": TOKEN})
    tasks = dataclasses.replace(QUICK, prefill=(), batches=(1,), head_bits=8, cache="static")
    folder = bench(recipe, tasks, tmp_path, say=lambda line: None)
    report = json.loads((folder / "bench.json").read_text())
    assert 3.5 < report["sides"]["fp32"]["head_bytes"] / report["sides"]["kernels"]["head_bytes"] <= 4
    assert report["decode_step"].keys() == {"fp32", "kernels"}
    assert (
        report["decode_step"]["fp32"]["quantizing inputs"] == 0 < report["decode_step"]["kernels"]["quantizing inputs"]
    )
    assert all(ms >= 0 for parts in report["decode_step"].values() for ms in parts.values())
    assert "| kernels | " in (folder / "bench.md").read_text().partition("Where a token's time goes")[2]
    with pytest.raises(UserError, match="--head: 17 is not valid"):
        bench(recipe, dataclasses.replace(tasks, head_bits=17), tmp_path)


def test_a_compiled_side_generates_with_a_static_cache_and_the_kernels_model(tiny_llama, monkeypatch):
    monkeypatch.setattr("ptq.integrations.compiled.missing", lambda: None)
    recipe = recipe_of(tiny_llama, {"weight": {"bits": 8}, "input": TOKEN})
    made = list(sides_of(recipe, [], 1, compiled=True))
    assert [side.name for side, _ in made] == ["fp32", "bf16", "simulated", "kernels", "kernels, compiled"]
    (kernels, model), (compiled, same) = made[-2:]
    assert same is model and kernels.batches and compiled.batches
    given = []
    monkeypatch.setattr(model, "generate", lambda ids, **options: given.append(options))
    kernels.decode(torch.ones(1, 4, dtype=torch.int64), 3)
    compiled.decode(torch.ones(1, 4, dtype=torch.int64), 3)
    assert "compile_config" not in given[0] and given[1]["compile_config"]._compile_all_devices
    assert given[1]["cache_implementation"] == "static" and given[1]["max_new_tokens"] == 3


def test_without_a_compiler_it_is_said_before_a_model_is_loaded(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr("ptq.integrations.compiled.missing", lambda: "no C++ compiler is there: install g++")
    monkeypatch.setattr("ptq.bench.sides.load", None)
    assert main(["bench", "--config", "smollm2-135m_w8a8", "--compile", "--no-loading"]) == 2
    assert "compile: no C++ compiler is there: install g++" in capsys.readouterr().err


def test_sides_take_turns_and_ratios_are_over_the_first():
    now = [0.0]
    order = []

    def side(name, seconds):
        def work():
            order.append(name)
            now[0] += seconds

        return work

    slow, fast = in_turn("task", {"slow": side("slow", 4.0), "fast": side("fast", 1.0)}, 8, 2, clock=lambda: now[0])
    assert order == ["slow", "fast"] * 3
    assert (slow.ratio, fast.ratio, fast.least, fast.most, fast.median, fast.tokens_a_second) == (1, 4, 4, 4, 1, 8)


def test_the_least_possible_time_is_that_of_arithmetic_or_of_reading():
    machine = Roofline({"int8": 1e12}, 1e10)
    assert machine.least_seconds(1, (1000, 1000), "int8", 8) == pytest.approx(1e6 / 1e10)
    assert machine.least_seconds(1000, (1000, 1000), "int8", 8) == pytest.approx(2e9 / 1e12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "llama.cp"], "--against: 'llama.cp' is no runtime"),
        (
            ["--against", "llama.cpp"],
            "--against: llama.cpp is not installed: python experiments/bench/llama_cpp.py --fetch",
        ),
        (["--rounds", "0"], "--rounds, --prefill and --batches are at least 1"),
        (["--run", "nowhere"], "--run: nowhere holds no finished run"),
        (["--run", "nowhere", "--config", "demo"], "--run: has its recipe already"),
        (["--fast"], "--fast: no such option"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_the_work(capsys, monkeypatch, arguments, said):
    monkeypatch.delenv("PTQ_LLAMA_CPP", raising=False)
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_each_runtime_says_what_it_needs():
    known = ["bitsandbytes", "bitsandbytes-int8", "llama-cpp", "onnxruntime-genai", "torch-qint8", "torchao", "vllm"]
    assert competitors() == known
    assert torch_qint8.NEEDS and torch_qint8.INSTALL


def test_a_prefill_beyond_the_models_positions_is_refused(tiny_llama):
    with pytest.raises(UserError, match="positions: use --prefill and --decode below that"):
        bench(recipe_of(tiny_llama, {"weight": {"bits": 8}}), Tasks(prefill=(10**6,)), say=lambda line: None)


def test_energy_a_token_stands_in_the_report_where_the_machine_tells(tiny_llama, tmp_path, monkeypatch):
    told = iter(range(10**6))
    monkeypatch.setattr("ptq.bench.benchmark.meter_of", lambda device: lambda: float(next(told)))
    monkeypatch.setattr("ptq.bench.energy.LEAST_SECONDS", 0.0)
    recipe = recipe_of(tiny_llama, {"weight": {"bits": 8}, "input": TOKEN})
    tasks = Tasks(prefill=(8,), decode=0, rounds=1, loading=False)
    folder = bench(recipe, tasks, tmp_path, say=lambda line: None)
    found = json.loads((folder / "bench.json").read_text())["joules_a_token"]
    assert found.keys() == {"prefill 8"} and found["prefill 8"].keys() == {"fp32", "bf16", "simulated", "kernels"}
    assert all(value > 0 for value in found["prefill 8"].values())
    assert "Millijoules a token" in (folder / "bench.md").read_text()


def test_energy_is_of_all_packages_and_a_counter_may_begin_again(tmp_path):
    assert meter_of(torch.device("cpu"), tmp_path) is None
    for name, microjoules in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(microjoules))
        (tmp_path / name / "max_energy_range_uj").write_text("999")
    meter = meter_of(torch.device("cpu"), tmp_path)
    assert meter is not None and meter() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("600")
    assert meter() == pytest.approx(650e-6)
    seconds = iter(range(100))
    energy = iter([1.0, 25.0])
    assert joules_a_token(lambda: None, 2, lambda: next(energy), lambda: next(seconds), 4) == pytest.approx(
        24 / (4 * 2)
    )


def test_other_runtimes_beside_a_model_on_a_gpu_are_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr("ptq.bench.sides.device_of", lambda recipe: torch.device("cuda"))
    with pytest.raises(
        UserError, match="--against: other runtimes are measured on CPUs, and this is cuda: add execution"
    ):
        next(sides_of(recipe_of(tiny_llama, {"weight": {"bits": 8}}), ["torch-qint8"], 1))
