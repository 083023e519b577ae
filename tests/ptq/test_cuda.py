"""Every step, solver and export, a cached second run and packed Linears on a CUDA device, without one: nothing mixes devices."""

import json
import pathlib
import types

import pytest
import torch
import transformers

from group_methods.reorder import permute_columns
from ptq.calibration.statistics import Statistics
from ptq.config.building import recipe_from
from ptq.config.schema import ExportConfig
from ptq.export.registry import shipped as exporters_of_ours
from ptq.integrations.replace import quantize_
from ptq.run.experiment import run
from ptq.run.exports import export_run
from ptq.steps._registry import shipped as steps_of_ours
from quantize.grid.affine import fake_quantize
from quantize.modules.simulated import InputQuantizer
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec
from tests.tools.virtual_cuda import CUDA, virtual_device


@pytest.fixture(scope="module")
def device():
    """The device itself, one for all tests: tables of levels stay on it."""
    return virtual_device()


def _cut(source, folder):
    """Two of the four blocks of a trained model: where tensors lie differs by kind of block, not by their number."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=2)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tiny_llama, tmp_path_factory):
    return _cut(tiny_llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama_eps(tiny_llama_eps, tmp_path_factory):
    """The same with the eps that llama2.c computes with."""
    return _cut(tiny_llama_eps, tmp_path_factory.mktemp("llama-eps"))


@pytest.fixture(scope="module")
def opt(tiny_opt, tmp_path_factory):
    return _cut(tiny_opt, tmp_path_factory.mktemp("opt"))


@pytest.fixture
def cuda(monkeypatch, device):
    """A CUDA device that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "virtual")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    properties = types.SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    device.calls = 0
    with device:
        yield device


# What the device tells.


def test_a_tensor_says_that_it_is_on_the_device_and_comes_back(cuda):
    x = torch.arange(6.0).view(2, 3)
    y = x.to("cuda")
    assert (x.device.type, y.device, y.is_cuda) == ("cpu", CUDA, True)
    assert (y.t() @ y).device == y[0].device == torch.zeros_like(y).device == y.new_empty(2).device == CUDA
    assert torch.empty(2, device=y.device).device == torch.nn.Parameter(y).device == CUDA
    assert y.cpu().device.type == "cpu" and torch.equal(y.cpu(), x)
    y.cpu().zero_()
    assert y.sum().item() == 15
    x.copy_(y)
    assert x.device.type == "cpu" and (y * torch.tensor(2.0)).device == CUDA
    assert torch.nn.Linear(3, 2).to("cuda").weight.device == CUDA


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.nn.functional.linear(there, here),
        lambda here, there: there.index_select(-1, torch.arange(2)),
        lambda here, there: here[torch.arange(2).to("cuda")],
        lambda here, there: torch.equal(here, there),
        lambda here, there: there.add_(here),
    ],
)
def test_two_devices_in_one_call_are_refused(cuda, mix):
    here = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        mix(here, here.to("cuda"))


def test_numpy_and_generators_stay_on_the_host(cuda):
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(2).to("cuda").numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=torch.Generator(), device="cuda")


def test_it_tells_the_three_faults_that_runs_had(cuda):
    statistics = torch.ones(16), -torch.ones(16)
    static = InputQuantizer(QuantSpec(granularity="channel"), (statistics[1], statistics[0]))
    weight, x = torch.ones(32, 16).to("cuda"), torch.ones(2, 8, 16).to("cuda")
    with pytest.raises(RuntimeError, match="same device"):
        static(x)
    with pytest.raises(RuntimeError, match="same device"):
        weight.index_select(-1, torch.arange(16))
    probabilities = InputQuantizer(QuantSpec(granularity="channel"), (torch.zeros(8), torch.ones(8)))
    with pytest.raises(RuntimeError, match="same device"):
        fake_quantize(torch.ones(1, 2, 8, 8).to("cuda"), probabilities.grid)
    assert permute_columns(weight, torch.arange(16)).device == CUDA


# What runs on it.

TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}
TENSOR = {"bits": 8, "granularity": "tensor", "symmetric": False}
CLUSTER = {"bits": 4, "granularity": "cluster", "symmetric": False}
CLUSTERED = {
    "weight": {"bits": 4, "granularity": "cluster"},
    "input": CLUSTER,
    "query": CLUSTER,
    "key": CLUSTER,
    "value": CLUSTER,
    "attention_probs": TENSOR,
}
GROUP = {"bits": 4, "granularity": "group", "group_size": 32}
TOKEN4 = {**TOKEN, "bits": 4}
W4A4 = {"weight": {"bits": 4}, "input": TOKEN4}
GPTQ = {"gptq": {}}
CASES = {
    "rtn, static": ({"weight": {"bits": 8}, "input": TENSOR}, {"rtn": {}}),
    "gptq, static by percentile": (
        {"weight": GROUP, "input": {**TENSOR, "range": "percentile", "percentile": 99.9}},
        GPTQ,
    ),
    "gptq, static by mse": ({"weight": {"bits": 4, "range": "mse"}, "input": {**TENSOR, "range": "mse"}}, GPTQ),
    "gptq, static by ema": ({"weight": {"bits": 4}, "input": {**TENSOR, "range": "ema"}}, GPTQ),
    "gptq, original target": ({"weight": GROUP, "input": TOKEN}, {"gptq": {"target": "original"}}),
    "gptq, residual target": ({"weight": GROUP, "input": TENSOR}, {"gptq": {"target": "residual"}}),
    "smooth, gptq": ({"weight": {"bits": 8}, "input": TENSOR}, {"smooth": {"alpha": 0.6}, "gptq": {}}),
    "smooth by search": ({"weight": {"bits": 8}, "input": TENSOR}, {"smooth": {"search": True}, "rtn": {}}),
    "smooth, cluster, gptq": (CLUSTERED, {"smooth": {}, "cluster": {}, "gptq": {}}),
    "clusters left in place": (CLUSTERED, {"cluster": {"reorder": False, "method": "max_min_kmeans"}, "rtn": {}}),
    "attention": ({"query": TENSOR, "key": TOKEN, "value": TENSOR, "attention_probs": TENSOR}, {"rtn": {}}),
    "nf4": ({"weight": {"format": "nf4", "bits": 4, "granularity": "group", "group_size": 64}}, {"rtn": {}}),
    "nvfp4": (
        {
            "weight": {"format": "nvfp4", "bits": 4, "granularity": "group", "group_size": 16},
            "input": {"format": "nvfp4", "bits": 4, "granularity": "group", "group_size": 16, "dynamic": True},
        },
        {"rtn": {}},
    ),
    "nvfp4, static inputs": (
        {
            "weight": {
                "format": "nvfp4",
                "bits": 4,
                "granularity": "group",
                "group_size": 16,
                "scales": "power_of_two",
            },
            "input": {"format": "nvfp4", "bits": 4, "granularity": "group", "group_size": 16},
        },
        {"gptq": {}},
    ),
    "fp8": (
        {
            "weight": {"format": "fp8_e4m3", "granularity": "channel"},
            "input": {"format": "fp8_e4m3", "granularity": "token", "dynamic": True},
        },
        {"rtn": {}},
    ),
    "llm_int8": (
        {"weight": {"bits": 8}, "input": {"format": "llm_int8", "granularity": "token", "dynamic": True}},
        {"rtn": {}},
    ),
    "rotate, clip, gptq": (
        {**W4A4, "key": {**TOKEN4, "bits": 4}},
        {"rotate": {"online": ["down", "out", "heads"]}, "clip": {}, "gptq": {}},
    ),
    "rotate, learned": (W4A4, {"rotate": {"learn": "cayley", "steps": 2}, "rtn": {}}),
    "wush": (W4A4, {"wush": {}, "rtn": {}}),
    "affine": (W4A4, {"affine": {"steps": 2}, "gptq": {}}),
    "awq": ({"weight": GROUP}, {"awq": {}, "rtn": {"scales": "diagonal"}}),
    "prefix, smooth": ({"weight": {"bits": 8}, "input": TENSOR}, {"prefix": {}, "smooth": {"search": True}, "rtn": {}}),
    "hqq": ({"weight": GROUP}, {"hqq": {}}),
    "lowrank": ({"weight": GROUP}, {"lowrank": {"rank": 4}}),
    "omniquant": ({"weight": GROUP}, {"omniquant": {"steps": 2, "held_out": 2}}),
    "autoround": ({"weight": GROUP}, {"autoround": {"steps": 2, "held_out": 2}}),
    "tune": ({"weight": GROUP}, {"rtn": {}, "tune": {"steps": 2, "held_out": 2}}),
    "cache": (
        {
            "key": {"bits": 4, "granularity": "channel", "symmetric": False, "dynamic": True},
            "value": {**TOKEN4, "symmetric": False},
            "cache": {"window": 8, "first": 2, "tokens": 8},
        },
        {"rtn": {}},
    ),
    "trellis, gptq": (
        # Its paths take time: of one block, one Linear and the one that its error is carried to.
        {"weight": {"format": "trellis", "bits": 2}, "exclude": ["*.layers.[!0].*", "*.mlp.*", "*.q_proj", "*.k_proj"]},
        {"rotate": {"online": []}, "gptq": {"target": "residual"}},
    ),
    "embedding and head": ({"weight": {"bits": 8}, "embedding": {"bits": 8}, "head": {"bits": 8}}, {"rtn": {}}),
}
CASES |= {
    name: ({"weight": dict(zip(("format", "bits", "granularity", "group_size"), form, strict=True))}, {"rtn": {}})
    for name, form in {
        "fp4": ("fp4", 4, "group", 64), "mxfp4": ("mxfp4", 4, "group", 32), "mxfp8": ("mxfp8", 8, "group", 32),
        "mxfp8_e5m2": ("mxfp8_e5m2", 8, "group", 32), "fp8_e5m2": ("fp8_e5m2", 8, "channel", None),
        "q8_0": ("q8_0", 8, "group", 64), "q8_0_gguf": ("q8_0_gguf", 8, "group", 32), "q4_k": ("q4_k", 4, "group", 32),
        "q5_k": ("q5_k", 5, "group", 32), "q6_k": ("q6_k", 6, "group", 16),
    }.items()
}  # fmt: skip
SMALL = {"calibration": {"samples": 4, "length": 48, "batch_size": 2}, "evaluation": {"windows": 2, "length": 48}}


def make(tmp_path, model, scheme, steps, **changes):
    """A small recipe on the device."""
    base = {
        "name": "cuda",
        "model": {"path": str(model), "dtype": "float32"},
        **SMALL,
        "scheme": scheme,
        "steps": steps,
        "execution": {"device": "cuda"},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    return recipe_from({**base, **changes})


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_run_and_a_second_one_out_of_the_store_stay_on_the_device(cuda, tmp_path, llama, name):
    scheme, steps = CASES[name]
    first = metrics(run(make(tmp_path, llama, scheme, steps)))
    assert cuda.calls > 1000 and first["kl_mean"] > 0
    second = metrics(run(make(tmp_path, llama, scheme, steps)))
    assert second["kl_mean"] == first["kl_mean"]


@pytest.fixture(scope="module")
def plain_runs():
    """What runs that several tests compare theirs with have found, by their model's folder."""
    return {}


@pytest.mark.parametrize(
    "setting", [{"weights": "offloaded", "prefetch": False}, {"hidden_states": "disk"}, {"save": True}]
)
def test_every_way_of_holding_things_stays_on_the_device(cuda, tmp_path, llama, plain_runs, setting):
    # What reads ahead does so in a thread and on a stream, and neither sees a device that is not there.
    scheme, steps = CASES["smooth, gptq"]
    if llama not in plain_runs:
        plain_runs[llama] = metrics(run(make(tmp_path / "plain", llama, scheme, steps)))
    held = metrics(run(make(tmp_path, llama, scheme, steps, execution={"device": "cuda", **setting})))
    assert held["kl_mean"] == plain_runs[llama]["kl_mean"]


def test_statistics_of_a_file_are_read_to_the_device(cuda, tmp_path, opt):
    scheme, steps = CASES["rtn, static"]
    run(make(tmp_path, opt, scheme, steps))
    [path] = [p for p in pathlib.Path(tmp_path / "store").rglob("*") if p.is_file() and _is_statistics(p)]
    calibration = {**SMALL["calibration"], "statistics": str(path)}
    recipe = make(tmp_path / "again", opt, scheme, steps, calibration=calibration)
    assert metrics(run(recipe))["kl_mean"] > 0
    assert all(s.min.device == CUDA for s in Statistics.load(path, "cuda").inputs.values())


def _is_statistics(path):
    return b"ptq-statistics" in path.read_bytes()[:4096]


EXPORTS = {
    "awq": ({"weight": {**GROUP, "symmetric": False}}, {"rtn": {}}),
    "gptq": ({"weight": GROUP}, {"rtn": {}}),
    "kuiper": ({"weight": {**GROUP, "bits": 8, "group_size": 64}}, {"rtn": {}}),
    "compressed-tensors": ({"weight": GROUP}, {"rtn": {}}),
    "gguf": ({"weight": {**GROUP, "bits": 8}}, {"rtn": {}}),
    "llama2c": (
        {
            "weight": {**GROUP, "bits": 8, "group_size": 64},
            "input": {**GROUP, "bits": 8, "group_size": 64, "dynamic": True},
        },
        {"rtn": {}},
    ),
}


def test_every_step_format_and_exporter_of_ours_is_among_them():
    assert {name for _, steps in CASES.values() for name in steps} == set(steps_of_ours())
    specs = [spec for scheme, _ in CASES.values() for spec in scheme.values() if isinstance(spec, dict)]
    assert {spec.get("format", "int") for spec in specs} == set(formats())
    assert set(EXPORTS) == {name.replace("_", "-") for name in exporters_of_ours()}


@pytest.mark.parametrize("format", EXPORTS)
def test_an_export_from_the_device_has_the_bytes_of_one_from_the_cpu(cuda, tmp_path, llama_eps, format):
    scheme, steps = EXPORTS[format]
    written = {}
    for device in ("cpu", "cuda"):
        settings = {"device": device, "save": True}
        folder = run(make(tmp_path, llama_eps, scheme, steps, export={"format": format}, execution=settings))
        written[device] = _weights(folder / "export")
        again = export_run(folder, ExportConfig(format), tmp_path / device / "again", False)
        assert all(part in written[device] for part in _weights(again.path))
    assert written["cpu"] == written["cuda"] and all(written["cpu"])


def test_corrections_on_the_device_are_written_as_they_were_kept(cuda, tmp_path, llama_eps):
    scheme, steps = CASES["lowrank"]
    settings, config = {"device": "cuda", "save": True}, ExportConfig("compressed-tensors")
    folder = run(make(tmp_path, llama_eps, scheme, steps, export={"format": config.format}, execution=settings))
    written = _weights(folder / "export")
    assert len(written) == 2
    assert written == _weights(export_run(folder, config, tmp_path / "again", False).path)


def _weights(path):
    """Returns the bytes of the file, or of the files in the folder that hold weights."""
    files = [p for p in sorted(path.rglob("*")) if p.suffix in {".safetensors", ".gguf", ".bin"}]
    return [file.read_bytes() for file in files or [path]]


@pytest.mark.parametrize("scheme", ["w8a8", "nf4", "llm_int8", "fp8", "nvfp4_w4a4", "mxfp4", "q8_0"])
def test_a_model_quantized_in_place_runs_on_the_device(cuda, llama, scheme):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).to("cuda")
    ids = torch.arange(8).view(1, 8).to("cuda")
    before = model(input_ids=ids).logits
    quantize_(model, scheme)
    after = model(input_ids=ids).logits
    assert after.device == CUDA and not torch.equal(before, after)
