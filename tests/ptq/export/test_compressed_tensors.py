"""compressed-tensors folders: transformers loads them and computes what the simulation computed."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.export.packing.shards import lossless
from ptq.export.quantized_tensors import ResidentSource
from ptq.export.to_compressed_tensors import Exporter, Options
from ptq.inspect.inspection import inspect
from ptq.network.network import build_network
from ptq.run.experiment import run
from ptq.run.in_memory import quantize
from ptq.testing import random_tiny
from quantize.codecs.e2m1 import e2m1_values
from quantize.codecs.packing import unpack
from quantize.spec.quant_spec import QuantSpec, spec_of

pytest.importorskip("compressed_tensors")

ROOT = pathlib.Path(__file__).resolve().parents[3]
IDS = (torch.arange(40) * 7 % 60)[None]
W8, W4 = QuantSpec(), QuantSpec(4)
TOKEN = QuantSpec(granularity="token", dynamic=True)
STATIC = QuantSpec(granularity="tensor", symmetric=False)
SCHEMES = {
    "w8a8": SchemeConfig(weight=W8, input=TOKEN),
    "w8a8 per tensor": SchemeConfig(weight=QuantSpec(granularity="tensor"), input=QuantSpec(granularity="tensor", dynamic=True)),
    "w8a8 static": SchemeConfig(weight=W8, input=STATIC),
    "w8a8 static symmetric": SchemeConfig(weight=W8, input=QuantSpec(granularity="tensor")),
    "w4a8 groups": SchemeConfig(
        weight=QuantSpec(4, granularity="group", group_size=16),
        input=QuantSpec(granularity="group", group_size=16, dynamic=True),
    ),
    "w4a16": SchemeConfig(weight=W4),
    "w3a16 groups": SchemeConfig(weight=QuantSpec(3, granularity="group", group_size=8)),
    "mixed": SchemeConfig(
        weight=W8, input=TOKEN, exclude=("*.0.*o_proj",),
        overrides=(Override("*.down_proj", {"weight": W4, "input": None}), Override("*.1.*up_proj", {"weight": None, "input": None})),
    ),
}  # fmt: skip
ASYMMETRIC = {
    "w4a16 groups": SchemeConfig(weight=QuantSpec(4, granularity="group", group_size=16, symmetric=False)),
    "w4a16": SchemeConfig(weight=QuantSpec(4, symmetric=False)),
}


def export(model, scheme, path, quantized):
    """Quantizes and exports `model`; returns the simulated logits and what the exporter said."""
    exporter = Exporter(Options())
    scheme = exporter.adapt(scheme)
    with torch.no_grad():
        ranges = input_ranges(model)
        source = quantized(model, scheme, ranges=ranges)
        return model(IDS).logits, exporter.write(source, path)


def input_ranges(model):
    """(min, max) of every Linear's input on `IDS`."""
    ranges, handles = {}, []
    for name, module in build_network(model).linears.items():

        def hook(module, args, name=name):
            rows = args[0].flatten(0, -2)
            ranges[name] = rows.amin(0), rows.amax(0)

        handles.append(module.register_forward_pre_hook(hook))
    model(IDS)
    for handle in handles:
        handle.remove()
    return ranges


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values())
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_computes_the_simulated_logits(tmp_path, llama_model, quantized, name):
    model = llama_model(tied=name == "w8a8")
    before = model(IDS).logits
    simulated, exported = export(model, SCHEMES[name], tmp_path / "out", quantized)
    assert (simulated - before).abs().max() > 1e-3
    assert (load(tmp_path / "out") - simulated).abs().max() < 1e-5
    assert exported.notes == ()
    assert exported.bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_packed_zero_points_load_dequantized_and_a_note_says_so(tmp_path, llama_model, quantized, name):
    simulated, exported = export(llama_model(), ASYMMETRIC[name], tmp_path / "out", quantized)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    assert (load(tmp_path / "out", quantization_config=config) - simulated).abs().max() < 1e-5
    assert "dequantize=True" in exported.notes[0]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3", "mistral", "phi", "bloom", "gpt_neox"])
def test_other_architectures_reload_too(tmp_path, quantized, architecture):
    simulated, _ = export(random_tiny(architecture), SCHEMES["w8a8"], tmp_path / "out", quantized)
    assert (load(tmp_path / "out") - simulated).abs().max() < 1e-5


def test_where_transformers_will_not_see_the_tokens_a_line_says_so_before_the_work(tmp_path, quantized):
    [note] = Exporter(Options()).check(SCHEMES["w8a8"], build_network(random_tiny("opt")))
    assert "hands fc1, fc2 (tokens, channels)" in note and "\n" not in note
    simulated, _ = export(random_tiny("opt"), SCHEMES["w8a8"], tmp_path / "out", quantized)
    # The line is true: a range over all tokens is another one. Where this fails transformers has changed, and the line goes.
    assert (load(tmp_path / "out") - simulated).abs().max() > 1e-3
    assert Exporter(Options()).check(SCHEMES["w8a8 static"], build_network(random_tiny("opt"))) == ()
    for architecture in ("llama", "bloom", "gemma3"):
        assert Exporter(Options()).check(SCHEMES["w8a8"], build_network(random_tiny(architecture))) == ()


def test_a_model_that_cannot_be_traced_is_said_to_be_untold(monkeypatch):
    network = build_network(random_tiny("opt"))
    monkeypatch.setattr(type(network.model), "forward", lambda *a, **k: torch.ones(1, device="meta").item())
    [note] = Exporter(Options()).check(SCHEMES["w8a8"], network)
    assert "could not be told (RuntimeError: " in note


def tensors(folder):
    """Every tensor of a folder of shards."""
    return {name: value for shard in sorted(folder.glob("*.safetensors")) for name, value in load_file(shard).items()}


def test_a_run_is_loaded_by_a_fresh_process(tmp_path, tiny_llama):
    scheme = {"weight": {"bits": 8}, "input": {"granularity": "token", "dynamic": True}}
    recipe = recipe_from(
        {
            "name": "ct", "model": {"path": str(tiny_llama)}, "evaluation": {"windows": 2, "length": 128},
            "calibration": {"samples": 2, "length": 64}, "execution": {"device": "cpu"},
            "scheme": scheme, "steps": {"rtn": {}}, "export": {"format": "compressed-tensors"},
            "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
        }
    )  # fmt: skip
    folder = run(recipe)
    metrics = json.loads((folder / "metrics.json").read_text())
    exported = folder / "export" / "compressed-tensors"
    again = dataclasses.replace(recipe, execution=dataclasses.replace(recipe.execution, weights="offloaded"))
    # Offloaded a block is a shard; its tensors are the same bits.
    one, other = (tensors(where / "export" / "compressed-tensors") for where in (folder, run(again)))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    code = f"""
import torch, transformers
from ptq.config.schema import TextConfig
from ptq.data.sampling import Draw
model = transformers.AutoModelForCausalLM.from_pretrained({str(exported)!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({str(exported)!r})
ids = Draw(TextConfig(split="test"), 2, 128).tokens(tokenizer).ids
with torch.no_grad():
    print([float(model(input_ids=w[None], labels=w[None]).loss) for w in ids])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses == pytest.approx(metrics["window_losses"]["quantized"], abs=1e-5)


def test_large_models_are_written_in_shards_with_an_index(tmp_path, llama_model, quantized, monkeypatch):
    monkeypatch.setattr("ptq.export.packing.shards.SHARD_BYTES", 8000)
    simulated, _ = export(llama_model(), SCHEMES["w8a8"], tmp_path / "out", quantized)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((tmp_path / "out" / file).is_file() for file in index["weight_map"].values())
    assert (load(tmp_path / "out") - simulated).abs().max() < 1e-5


def test_inspect_describes_the_folder(tmp_path, llama_model, quantized):
    export(llama_model(), SCHEMES["mixed"], tmp_path / "out", quantized)
    report = inspect(tmp_path / "out")
    assert report.format == "compressed-tensors" and report.header["format"] == "mixed-precision"
    errors = {t.name: t.greatest_error for t in report.tensors}
    assert errors["model.layers.0.mlp.down_proj.weight_packed"] > errors["model.layers.0.mlp.up_proj.weight"] > 0
    assert errors["model.norm.weight"] is None


def test_only_what_16_bits_hold_is_stored_in_16_bits():
    exact = torch.tensor([1.0, 0.5])
    assert lossless(exact).dtype == torch.float16 and lossless(exact / 3).dtype == torch.float32
    assert lossless(torch.tensor([1e30]).bfloat16().float()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (SchemeConfig(weight=QuantSpec(granularity="cluster")), "scheme.weight.granularity: 'cluster'"),
        (SchemeConfig(weight=W8, input=QuantSpec(granularity="channel")), "scheme.input.granularity: 'channel'"),
        (SchemeConfig(input=TOKEN), "scheme.weight: null"),
        (SchemeConfig(weight=W8, value=TOKEN), "scheme.value"),
        (SchemeConfig(), "nothing is quantized"),
    ],
)
def test_what_the_format_has_no_words_for_is_refused(llama_model, scheme, words):
    with pytest.raises(UserError) as error:
        Exporter(Options()).check(scheme, build_network(llama_model()))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_modules_that_are_no_linears_are_refused():
    with pytest.raises(UserError, match="is a Conv1D"):
        Exporter(Options()).check(SCHEMES["w8a8"], build_network(random_tiny("gpt2")))
    with pytest.raises(UserError, match="is a FalconLinear"):
        Exporter(Options()).check(SCHEMES["w4a16"], build_network(random_tiny("falcon")))


def test_a_run_that_did_not_use_the_formats_rounding_is_told(tmp_path, llama_model, quantized):
    source = quantized(llama_model(), SCHEMES["w8a8"])
    exported = Exporter(Options()).write(source, tmp_path / "out")
    assert "differ slightly" in exported.notes[0]
    (tmp_path / "out" / "stale").write_text("")
    Exporter(Options()).write(source, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_export_leaves_the_old_folder_whole(tmp_path, llama_model, quantized, monkeypatch):
    source = quantized(llama_model(), SCHEMES["w8a8"])
    Exporter(Options()).write(source, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(
        "ptq.export.to_compressed_tensors._write_config", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        Exporter(Options()).write(source, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_missing_package_is_named(llama_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r"pip install 'ptq-framework\[export\]'"):
        Exporter(Options()).check(SCHEMES["w8a8"], build_network(llama_model()))


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3"),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj"),
        ("deepseek_v3", "model.layers.1.mlp.experts.2.up_proj"),
    ],
)
def test_experts_have_the_names_of_the_models_own_checkpoints_and_routers_are_left_alone(
    architecture, module, tmp_path, quantized
):
    source = quantized(random_tiny(architecture), SCHEMES["w4a16"])
    Exporter(Options()).write(source, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"{module}.weight_packed", f"{module}.weight_scale"} <= held.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not any(name.endswith("gate.weight_packed") for name in held)
    experts = [name for name in held if ".experts." in name and name.endswith("weight_packed")]
    network = source.network
    assert len(experts) == sum(len(names) for block in network.blocks for names in block.experts.values())
    assert "lm_head" in config["ignore"]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
def test_transformers_gives_the_simulated_logits_of_packed_experts(architecture, tmp_path, quantized):
    simulated, exported = export(random_tiny(architecture), SCHEMES["w4a16"], tmp_path / "out", quantized)
    assert (load(tmp_path / "out") - simulated).abs().max() < 1e-5
    assert not any("experts" in note for note in exported.notes)


def test_a_note_says_which_experts_transformers_does_not_read():
    notes = Exporter(Options()).check(SCHEMES["w8a8"], build_network(random_tiny("mixtral")))
    assert any("experts.0.gate_proj, ...) with quantized inputs: vLLM reads them" in note for note in notes)


def test_static_float_inputs_of_experts_are_said_to_have_one_scale_in_vllm():
    network = build_network(random_tiny("mixtral"))
    for dynamic in (False, True):
        inputs = spec_of("fp8_e4m3", activation=True, granularity="tensor", dynamic=dynamic)
        notes = Exporter(Options()).check(SchemeConfig(weight=spec_of("fp8_e4m3"), input=inputs), network)
        assert any("greatest of their static scales" in note for note in notes) != dynamic


def test_experts_that_no_checkpoint_holds_one_by_one_are_refused_by_name():
    with pytest.raises(UserError, match=r"mlp.experts.0.gate_proj in one tensor with the others.*export=null"):
        Exporter(Options()).check(SCHEMES["w8a8"], build_network(random_tiny("gpt_oss")))


FLOATS = {
    "fp8": (SchemeConfig(weight=spec_of("fp8_e4m3"), input=spec_of("fp8_e4m3", activation=True)), "float-quantized"),
    "fp8 per tensor": (
        SchemeConfig(
            weight=spec_of("fp8_e4m3", granularity="tensor"), input=spec_of("fp8_e4m3", activation=True, granularity="tensor")
        ),
        "float-quantized",
    ),
    "fp8 static": (
        SchemeConfig(
            weight=spec_of("fp8_e4m3"),
            input=spec_of("fp8_e4m3", activation=True, granularity="tensor", dynamic=False),
        ),
        "float-quantized",
    ),
    "fp8 weights": (SchemeConfig(weight=spec_of("fp8_e4m3")), "naive-quantized"),
    "nvfp4": (SchemeConfig(weight=spec_of("nvfp4")), "nvfp4-pack-quantized"),
    "nvfp4 with inputs": (
        SchemeConfig(weight=spec_of("nvfp4"), input=spec_of("nvfp4", activation=True, dynamic=False)), "nvfp4-pack-quantized"
    ),
    "mxfp4": (SchemeConfig(weight=spec_of("mxfp4")), "mxfp4-pack-quantized"),
    "mxfp4 with inputs": (SchemeConfig(weight=spec_of("mxfp4"), input=spec_of("mxfp4", activation=True)), "mxfp4-pack-quantized"),
    "mxfp8": (SchemeConfig(weight=spec_of("mxfp8")), "mxfp8-quantized"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_floats_lie_as_the_packages_own_compressors_read_them(tmp_path, llama_model, quantized, name):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme, format_name = FLOATS[name]
    model = llama_model(intermediate_size=64)
    with torch.no_grad():
        source = quantized(model, scheme, ranges=input_ranges(model))
    Exporter(Options()).check(scheme, source.network)
    Exporter(Options()).write(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in written.items() if k != "version"})
    [group] = config.config_groups.values()
    assert group.format == format_name and (group.input_activations is None) == (scheme.input is None)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(format_name)
    assert compressor.can_compress(torch.nn.Linear, group)
    for linear in source.network.linears:
        state = {k.removeprefix(f"{linear}."): v for k, v in tensors.items() if k.startswith(f"{linear}.")}
        static = scheme.input is not None and not scheme.input.dynamic
        given = {"input_global_scale" if name == "nvfp4 with inputs" else "input_scale"} if static else set()
        assert set(state) == {*compressor.compression_param_names(group), *given}
        found = compressor.decompress(state, group)["weight"].float()
        # The package multiplies levels and scales of 4 bits in bfloat16.
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if name.startswith("fp8") else {"rtol": 1e-2, "atol": 1e-4}
        torch.testing.assert_close(found, source.linear(linear).dense(), **tolerance)


@pytest.mark.parametrize("name", ["fp8", "fp8 static", "fp8 weights", "mxfp4", "nvfp4"])
def test_transformers_computes_with_floats_what_the_simulation_did(tmp_path, llama_model, quantized, name):
    simulated, exported = export(llama_model(intermediate_size=64), FLOATS[name][0], tmp_path / "out", quantized)
    four = name.endswith("fp4")
    found = load(tmp_path / "out", dtype=torch.bfloat16 if four else torch.float32).float()
    assert ("dtype=torch.bfloat16" in "".join(exported.notes)) == four
    assert (found - simulated).abs().max() < (0.15 if four else 0.03) * simulated.std()


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (SchemeConfig(weight=spec_of("nf4")), "scheme.weight.format: 'nf4'"),
        (SchemeConfig(weight=spec_of("fp8_e4m3", granularity="group", group_size=32)), "scheme.weight.granularity: 'group'"),
        (SchemeConfig(weight=spec_of("nvfp4"), input=spec_of("nvfp4", activation=True)), "scheme.input.dynamic: true"),
        (SchemeConfig(weight=spec_of("fp8_e4m3"), input=TOKEN), "a weight of fp8_e4m3 goes with inputs of fp8_e4m3 a token or tensor"),
        (SchemeConfig(weight=W8, input=spec_of("mxfp4", activation=True)), "a weight of int goes with inputs of no float format"),
    ],
)  # fmt: skip
def test_floats_that_the_format_cannot_hold_are_refused(llama_model, scheme, words):
    with pytest.raises(UserError) as error:
        Exporter(Options()).check(scheme, build_network(llama_model()))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_package_rounds_nvfp4_inputs_with_the_scale_in_the_file_as_the_simulation_does(
    tmp_path, llama_model, quantized
):
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    scheme, model = FLOATS["nvfp4 with inputs"][0], llama_model(intermediate_size=64)
    ranges = input_ranges(model)
    with torch.no_grad():
        source = quantized(model, scheme, ranges=ranges)
    Exporter(Options()).write(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in written.items() if k != "version"})
    [group] = config.config_groups.values()
    assert group.input_activations.dynamic == "local"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in source.network.linears:
        low, high = ranges[name]
        x = torch.rand(50, len(low)) * (high - low) * 1.2 + low
        theirs = torch.nn.Module()
        theirs.quantization_status = QuantizationStatus.COMPRESSED
        theirs.input_global_scale = tensors[f"{name}.input_global_scale"]
        found, mine = forward_quantize(theirs, x, "input", group.input_activations), model.get_submodule(name).inputs(x)
        # They multiply by the divisor's reciprocal where the codec divides: a value in the middle may fall on either side.
        assert ((found - mine).abs() > 1e-5 * mine.abs()).float().mean() < 0.01
        assert (found - mine).abs().max() < 0.4 * x.abs().max()


def test_linears_that_vllm_multiplies_as_one_have_one_scale_of_the_tensor_and_the_values_that_they_had(
    tmp_path, llama_model, quantized
):
    exporter, model = Exporter(Options()), llama_model(intermediate_size=64)
    with torch.no_grad():
        # As far apart as a scale of the tensor tells them.
        model.model.layers[0].self_attn.k_proj.weight *= 0.1
        model.model.layers[1].mlp.up_proj.weight *= 5
    scheme = dataclasses.replace(exporter.adapt(FLOATS["nvfp4"][0]), head=spec_of("nvfp4"))
    source = quantized(model, scheme)
    exported = exporter.write(source, tmp_path / "out")
    assert not any("scale" in note for note in exported.notes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for index in range(2):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            linears = [f"model.layers.{index}.{name}" for name in names]
            [divisor] = {float(tensors[f"{linear}.weight_global_scale"]) for linear in linears}
            assert math.log2(divisor).is_integer()
            for linear in linears:
                elements = e2m1_values(unpack(tensors[f"{linear}.weight_packed"], 4, 32)).view(-1, 2, 16)
                scales = tensors[f"{linear}.weight_scale"].float() / divisor
                assert torch.equal((elements * scales[..., None]).flatten(1), source.linear(linear).dense())


def test_scales_of_the_tensor_that_cannot_be_shared_are_said_and_left_alone(tmp_path, llama_model, quantized):
    source = quantized(llama_model(intermediate_size=64), FLOATS["nvfp4"][0])
    exported = Exporter(Options()).write(source, tmp_path / "out")
    assert (
        "vLLM keeps one scale of the tensor for those that it multiplies as one of q_proj, k_proj, v_proj"
        in "".join(exported.notes)
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for linear in source.network.linears:
        assert tensors[f"{linear}.weight_global_scale"] == 1 / source.linear(linear).stored["tensor_scale"]


def test_a_scale_of_fp8_for_the_tensor_is_said_to_be_rounded_again_by_vllm(llama_model):
    network = build_network(llama_model())
    for granularity, said in (("tensor", True), ("channel", False)):
        scheme = SchemeConfig(weight=spec_of("fp8_e4m3", granularity=granularity))
        assert ("rounds them again" in "".join(Exporter(Options()).check(scheme, network))) == said


STATIC_FP8 = spec_of("fp8_e4m3", activation=True, granularity="tensor", dynamic=False)
CACHED = dataclasses.replace(FLOATS["fp8 static"][0], key=STATIC_FP8, value=STATIC_FP8)


def test_a_cache_in_fp8_has_its_scheme_and_a_scale_of_keys_and_values_in_each_attention(tmp_path, llama_model):
    model = llama_model(intermediate_size=64)
    network = build_network(model)
    Exporter(Options()).check(CACHED, network)
    quantize(model, CACHED, {"rtn": {}}, IDS)
    source = ResidentSource(network, None, CACHED)
    Exporter(Options()).write(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {key: written[key] for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")} == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True
    }  # fmt: skip
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for index, layer in enumerate(model.model.layers):
        held = layer.self_attn.attention_quantizers.quantizers
        for short, tensor in (("k", "key"), ("v", "value")):
            assert torch.equal(tensors[f"model.layers.{index}.self_attn.{short}_scale"], held[tensor].scale.reshape(1))
    assert not any("attention_quantizers" in name for name in tensors)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
    found = load(tmp_path / "out", dtype=torch.float32)
    assert (found - wanted).abs().max() < 0.05 * wanted.std()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": None}, "scheme.value: compressed-tensors holds caches"),
        ({"key": QuantSpec(bits=8, granularity="token", dynamic=True)}, "scheme.key: compressed-tensors holds caches"),
        ({"query": STATIC_FP8}, "scheme.query: quantized, but"),
        ({"exclude": ("*.0.self_attn",)}, "scheme.exclude: '*.0.self_attn' leaves"),
        ({"overrides": (Override("*.1.*", {"key": None}),)}, "scheme.overrides: compressed-tensors has one format"),
    ],
)
def test_caches_that_the_format_cannot_hold_are_refused_before_the_work(llama_model, changes, words):
    with pytest.raises(UserError) as error:
        Exporter(Options()).check(dataclasses.replace(CACHED, **changes), build_network(llama_model()))
    assert words in str(error.value) and "\n" not in str(error.value)
