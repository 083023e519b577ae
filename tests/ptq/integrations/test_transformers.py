"""transformers' own interface: quantized while loading, saved and loaded again, placed on devices, generating, with adapters."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.integrations.replace import dequantize_, quantize_
from ptq.integrations.transformers import PtqConfig
from ptq.testing import random_tiny
from quantize.modules.packed import LlmInt8Linear, PackedLinear
from quantize.spec.quant_spec import QuantSpec

IDS = torch.arange(24)[None] % 60
NF4 = {"scheme": "nf4", "group_size": 16, "double_quant": True}
CONFIGS = [
    NF4,
    {"scheme": "fp4", "group_size": 8},
    {"scheme": "llm.int8"},
    {"scheme": "w8a8"},
    {"scheme": "w4a16"},
    {"scheme": "fp8"},
    {"scheme": "q8_0", "group_size": 16},
    {"scheme": SchemeConfig(weight=QuantSpec(bits=2, granularity="group", group_size=16, symmetric=False))},
    {"scheme": SchemeConfig(weight=QuantSpec(bits=2, format="trellis"))},
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    """Folder of a random model in fp32 whose head is not tied (llama) or tied (gpt2)."""
    path = tmp_path_factory.mktemp(request.param)
    random_tiny(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    random_tiny("llama").save_pretrained(path)
    return path


def loaded(folder, config=None, **keywords):
    # Not quantization_config=None: transformers takes that for "as if the file's config said nothing".
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **given, **keywords)


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: str(options["scheme"])[:8])
def test_a_model_is_quantized_while_loading_and_comes_back_with_the_same_logits(folder, tmp_path, options):
    model = loaded(folder, PtqConfig(**options))
    assert len(packed(model)) == (14 if "llama" in str(folder) else 8)
    assert not any(p.requires_grad for module in packed(model).values() for p in module.parameters())
    in_place = loaded(folder)
    quantize_(in_place, PtqConfig(**options).scheme)
    assert torch.equal(model(IDS).logits, in_place(IDS).logits)
    for i, source in enumerate((model, in_place)):
        source.save_pretrained(tmp_path / str(i))
        again = loaded(tmp_path / str(i))
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert again.state_dict().keys() == source.state_dict().keys()
        again.save_pretrained(tmp_path / f"{i}-again")
        assert (tmp_path / f"{i}-again/config.json").read_text() == (tmp_path / f"{i}/config.json").read_text()


def test_the_file_holds_codes_and_scales_and_the_config_says_how(llama, tmp_path):
    loaded(llama, PtqConfig(**NF4, skip_modules=["lm_head", "layers.0"])).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "ptq"
    assert entry["specs"]["weight"]["double_quant"] is True
    assert entry["skip_modules"] == ["lm_head", "layers.0"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    linear = "model.layers.1.mlp.up_proj"
    assert {n for n in names if n.startswith(linear)} == {
        f"{linear}.{part}" for part in ("codes", "scale", "scale_step", "scale_mean")
    }
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert set(packed(loaded(tmp_path))) == {n for n in packed(loaded(llama, PtqConfig(**NF4))) if ".1." in n}


def test_what_a_filter_left_alone_is_left_alone_when_it_comes_back(llama, tmp_path):
    model = loaded(llama)
    quantize_(model, "w8a8", filter_fn=lambda module, name: "mlp" in name)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert packed(again).keys() == packed(model).keys()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_fresh_process_loads_it_once_the_module_is_imported(llama, tmp_path):
    model = loaded(llama, PtqConfig(**NF4))
    model.save_pretrained(tmp_path / "model")
    save_file({"logits": model(IDS).logits.detach()}, tmp_path / "logits.safetensors")
    code = f"""
import ptq.integrations.transformers, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
expected = load_file({str(tmp_path / "logits.safetensors")!r})["logits"]
print(torch.equal(model(torch.arange(24)[None] % 60).logits, expected), type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "PackedLinear"]


def places(model):
    """A map that leaves the last block on disk and the rest on the CPU."""
    blocks = "model.layers" if hasattr(model, "model") else "transformer.h"
    base = blocks.split(".")[0]
    parts = [name for name, _ in getattr(model, base).named_children() if f"{base}.{name}" != blocks]
    return {
        **{f"{base}.{part}": "cpu" for part in parts},
        f"{blocks}.0": "cpu",
        f"{blocks}.1": "disk",
        "lm_head": "cpu",
    }


@pytest.mark.parametrize(
    "options", [NF4, {"scheme": "llm.int8"}, {"scheme": "fp8"}], ids=lambda options: options["scheme"]
)
def test_a_map_may_place_blocks_on_the_disk_and_auto_places_them_itself(folder, tmp_path, options):
    expected = loaded(folder, PtqConfig(**options))
    expected.save_pretrained(tmp_path / "saved")
    for i, (source, config) in enumerate(((folder, PtqConfig(**options)), (tmp_path / "saved", None))):
        auto = loaded(source, config, device_map="auto")
        if torch.cuda.is_available():
            torch.testing.assert_close(auto(IDS).logits.cpu(), expected(IDS).logits, rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(auto(IDS).logits, expected(IDS).logits)
        there = loaded(source, config, device_map=places(expected), offload_folder=tmp_path / f"offload{i}")
        away = {name for name, module in packed(there).items() if module.codes.is_meta}
        assert away == {name for name in packed(there) if ".1." in name}
        assert torch.equal(there(IDS).logits, expected(IDS).logits)
        there.save_pretrained(tmp_path / f"again{i}")
        assert torch.equal(loaded(tmp_path / f"again{i}")(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_generates_greedily_and_by_sampling_from_logits_in_fp32(folder, tmp_path, dtype):
    model = loaded(folder, PtqConfig("w8a8"), dtype=dtype)
    assert model(IDS).logits.dtype == dtype
    ids, mask = IDS[:, :8], torch.ones(1, 8, dtype=torch.long)
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    greedy = model.generate(ids, do_sample=False, output_logits=True, output_scores=True, **options)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, temperature=0.8, output_logits=True, output_scores=True, **options)
    for result in (greedy, sampled):
        assert result.sequences.shape == (1, 14)
        assert {t.dtype for t in (*result.logits, *result.scores)} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path, dtype=dtype).generate(ids, do_sample=False, **options)
    assert torch.equal(again.sequences, greedy.sequences)


@pytest.mark.parametrize(
    "options", [NF4, {"scheme": "llm.int8"}, {"scheme": "fp8"}], ids=lambda options: options["scheme"]
)
def test_adapters_attach_to_packed_linears_and_train_through_the_frozen_weight(folder, options):
    peft = pytest.importorskip("peft")
    model = loaded(folder, PtqConfig(**options))
    plain = model(IDS).logits.detach()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    names = {name.rpartition(".")[2] for name in packed(model)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=sorted(names)))
    assert torch.equal(adapted(IDS).logits, plain)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(packed(model))
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    # The first step moves B away from 0: from then on gradients reach A in every block.
    assert all(p.grad.any() for p in trained.values())
    assert losses[-1] < losses[0]
    after = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p for name, p in adapted.named_parameters()
    }
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    with pytest.raises(ValueError, match="cannot be written: use ptq.integrations.replace.dequantize_"):
        adapted.merge_and_unload()
    assert torch.equal(adapted.unload()(IDS).logits, plain)


def test_the_gradient_of_an_adapter_is_that_of_the_dequantized_model(llama):
    peft = pytest.importorskip("peft")
    gradients = []
    for dequantize in (False, True):
        model = loaded(llama, PtqConfig(**NF4))
        if dequantize:
            dequantize_(model)
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora)
        adapted(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    first, second = gradients
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)


def test_transformers_own_dequantize_gives_plain_linears_and_a_plain_config(llama, tmp_path):
    model = loaded(llama, PtqConfig(**NF4))
    expected = model(IDS).logits
    model = model.dequantize()
    assert not packed(model)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_the_threshold_reaches_the_linears(llama):
    model = loaded(llama, PtqConfig("llm.int8", threshold=0.5))
    model(IDS)
    linears = packed(model).values()
    assert all(isinstance(m, LlmInt8Linear) and m.input_spec.threshold == 0.5 for m in linears)
    assert any(m.outlier_share > 0 for m in linears)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "nf5"}, "'nf5' is no shipped scheme; did you mean 'nf4'"),
        ({"scheme": "w8a8", "double_quant": True}, "PtqConfig.double_quant: True is not valid.*nf4"),
        ({"scheme": "mxfp4", "group_size": 64}, "PtqConfig.group_size: 64 is not valid: expected 32"),
        ({"scheme": "nf4", "threshold": 3.0}, "PtqConfig.threshold: 3.0, but this scheme leaves the input alone"),
        ({"scheme": "llm.int8", "threshold": -1.0}, "PtqConfig.threshold: -1.0 is not valid"),
        ({"scheme": "w8a8_static"}, "scheme.input.dynamic: false needs calibration"),
        ({"scheme": "nf4", "groupsize": 64}, "no option 'groupsize'; did you mean 'group_size'"),
        ({"scheme": "nf4", "skip_modules": "lm_head"}, "is a text: use a list"),
    ],
)
def test_what_a_config_cannot_mean_is_said_before_anything_is_loaded(options, message):
    with pytest.raises(UserError, match=message) as caught:
        PtqConfig(**options)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_model_is_said_at_load(llama, tmp_path):
    with pytest.raises(UserError, match="64 does not divide the 32 channels of model.layers.0.*use 32"):
        loaded(llama, PtqConfig("nf4"))
    with pytest.raises(UserError, match="exclude: 'q_prj' matches no Linear; did you mean 'q_proj'"):
        loaded(llama, PtqConfig("w8a8", skip_modules=["q_prj"]))
    loaded(llama, PtqConfig("w8a8")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert next(iter(packed(loaded(tmp_path, PtqConfig("w4a16"))).values())).weight_spec.bits == 8


def test_a_tied_head_that_is_asked_for_is_refused_at_load(tmp_path):
    random_tiny("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head.weight: is transformer.wte.weight too"):
        loaded(tmp_path, PtqConfig("w8a8", skip_modules=[]))


def test_weights_that_are_not_finite_or_missing_are_named_at_load(llama, tmp_path):
    random_tiny("llama").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][2, 3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN or inf"):
        loaded(tmp_path, PtqConfig("w8a8"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: is not in the checkpoint"):
        loaded(tmp_path, PtqConfig("w8a8"))
