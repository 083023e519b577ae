"""Every shipped scheme in every export: refused before the work with advice that works, or written and reloaded."""

import functools
import json
import re
import warnings

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.config.building import recipe_from
from ptq.config.schema import ExportConfig, TextConfig
from ptq.data.sampling import Draw
from ptq.errors import UserError
from ptq.export.registry import build_exporter, shipped
from ptq.inspect.q8_readers import open_kuiper, open_llama2c
from ptq.inspect.q8_reference import Reference
from ptq.network.skeleton import skeleton
from ptq.run.experiment import dry_run, run
from ptq.testing import byte_tokenizer

pytest.importorskip("compressed_tensors")

SCHEMES = catalog.groups()["scheme"]
EXPRESSED = {
    "compressed-tensors": {
        "w2a16_g64", "w3a16_g64", "w4a16", "w4a16_g32", "w4a16_g64", "w4a4", "w4a4_asym", "w4a4_g64", "w4a8", "w4a8_g64", "w4a8_g128",
        "w4a4_static", "w8a16", "w8a16_g32", "w8a16_g64", "w8a8", "w8a8_g64", "w8a8_static", "w8a8_tensor",
        "fp8", "fp8_static", "mxfp4", "mxfp4_w4a4", "mxfp8", "nvfp4", "nvfp4_w4a4_static",
    },
    "gguf": {"w2a16_g64", "w3a16_g64", "w4a16", "w4a16_g32", "w4a16_g64", "w8a16", "w8a16_g32", "w8a16_g64"},
    "llama2c": {"w8a8_g64"},
    "kuiper": {"w8a16_g32", "w8a16_g64"},
    "gptq": {"w2a16_g64", "w4a16", "w4a16_g32", "w4a16_g64", "w8a16", "w8a16_g32", "w8a16_g64"},
    "awq": {"w4a16_g32", "w4a16_g64"},
}  # fmt: skip
"""What each format holds; all else it refuses. Written out, so that neither changes unseen."""
PAIRS = [(scheme, export) for export in sorted(EXPRESSED) for scheme in SCHEMES]
LONG = ["evaluation.length=192"]
FITTED = {
    "rptq_w4a4": ["scheme.overrides=[]"], "kv2": LONG, "kv4": LONG, "w4a4kv4": LONG, "w4a4kv4_asym": LONG,
    "w4a8_g128": ["scheme.weight.group_size=64", "scheme.input.group_size=64"],
}  # fmt: skip
"""What makes a scheme fit the tiny LLaMA and its windows: OPT's names of Linears are not there, 64 tokens leave nothing behind a
cache's window, and groups of 128 are wider than it."""
WINDOWS, LENGTH = 2, 64
FLOATS = {
    "fp8": 1e-3, "fp8_static": 1e-3, "mxfp8": 2e-2, "mxfp4": 2e-2, "nvfp4": 2e-2, "mxfp4_w4a4": 1e-1,
    "nvfp4_w4a4_static": 1e-1,
}  # fmt: skip
"""How far losses may lie apart: the package decodes MX and NV floats to bfloat16, and rounds inputs by scales of its own: how many
4-bit codes of inputs turn with that depends on the model, which each processor trains a little otherwise (0.078 on
Zen 3)."""


@pytest.fixture(scope="module")
def compose(tmp_path_factory, tiny_llama_eps):
    """The function from a scheme's name, an export and further overrides to a recipe of the tiny model."""
    folder = tmp_path_factory.mktemp("schemes")

    def make(scheme, export, *overrides):
        content = {
            "defaults": [{"scheme": scheme}, {"export": export}, "_self_"], "name": f"{scheme}-{export}",
            "model": {"path": str(tiny_llama_eps)}, "steps": {"rtn": {}}, "execution": {"device": "cpu"},
            "calibration": {"samples": 1, "length": LENGTH}, "evaluation": {"windows": WINDOWS, "length": LENGTH},
            "outputs": str(folder / "outputs"), "store": str(folder / "store"),
        }  # fmt: skip
        if "cluster" in (catalog.config_folder() / "scheme" / f"{scheme}.yaml").read_text():
            content["steps"] = {"cluster": {"clusters": {"mlp": 4}}, "rtn": {}}
        path = folder / f"{scheme}-{export}.yaml"
        path.write_text(yaml.safe_dump(content))
        [job] = compose_jobs(
            path, [*(() if any(o.startswith("scheme=") for o in overrides) else FITTED.get(scheme, ())), *overrides]
        )
        return job.recipe

    return make


@pytest.fixture(scope="module")
def dry_run_once():
    """Dry-runs a recipe unless one that differs by its name alone has passed: the advice of many schemes is one scheme."""
    passed = []

    def check(recipe):
        content = {key: value for key, value in recipe.as_dict().items() if key != "name"}
        if content not in passed:
            dry_run(recipe)
            passed.append(content)

    return check


@pytest.fixture(scope="module")
def built():
    """A model's skeleton, built once: exporters look at it."""
    return functools.cache(skeleton)


def test_the_table_names_every_format_and_only_schemes_that_there_are():
    assert set(EXPRESSED) == set(shipped()) == set(catalog.groups()["export"])
    assert set().union(*EXPRESSED.values()) <= set(SCHEMES)


@pytest.mark.parametrize(("scheme", "export"), [p for p in PAIRS if p[0] not in EXPRESSED[p[1]]])
def test_what_a_format_cannot_hold_is_refused_before_the_work_with_advice_that_works(
    compose, dry_run_once, built, scheme, export
):
    refused = compose(scheme, export)
    with pytest.raises(UserError) as error:
        dry_run(refused)
    message = str(error.value)
    assert message.startswith("scheme.") and "\n" not in message
    # As overrides of the recipe that was refused.
    overrides = re.findall(r"\bscheme\S*=\S+", message)
    assert overrides
    dry_run_once(compose(scheme, export, *overrides))
    # As the whole scheme of a recipe that names no shipped one.
    [fields] = re.findall(r"\((weight .*)\)", message)
    own = yaml.safe_load("{" + re.sub(r"\b(weight|input) ", r"\1: ", fields) + "}")
    recipe = recipe_from({**refused.as_dict(), "scheme": own, "steps": {"rtn": {}}})
    exporter = build_exporter(ExportConfig(export))
    exporter.check(exporter.adapt(recipe.scheme), built(recipe.model))


@pytest.mark.parametrize(("scheme", "export"), [p for p in PAIRS if p[0] in EXPRESSED[p[1]]])
def test_what_a_format_can_hold_is_written_and_computes_the_same_when_it_is_reloaded(compose, scheme, export):
    folder = run(compose(scheme, export))
    simulated = torch.tensor(json.loads((folder / "metrics.json").read_text())["window_losses"]["quantized"])
    ids = Draw(TextConfig(split="test"), WINDOWS, LENGTH).tokens(byte_tokenizer()).ids
    logits = RELOADED[export](folder / "export" / export, ids)
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    # llama2.c and KuiperLLama round the head too, llama2.c the embedding and the head's input: never simulated.
    tolerance = 5e-3 if export in ("llama2c", "kuiper") else 1e-5
    assert (losses - simulated).abs().max() < FLOATS.get(scheme, tolerance)


def compressed_tensors(folder, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CompressedTensorsConfig(dequantize=True)
        packed = json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
        options = {"quantization_config": config} if packed else {}
        if any(name in (folder / "config.json").read_text() for name in ("nvfp4", "mxfp4", "mxfp8")):
            options["dtype"] = torch.bfloat16
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    with torch.no_grad():
        # One by one: a range over a whole tensor is one over a sample, and transformers takes it over the batch.
        return torch.cat([model(window[None]).logits.float() for window in ids])


def gguf(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits


def llama2c(folder, ids):
    reference = Reference(open_llama2c(folder / "model.bin"), 1e4, 1e-5, interleaved=True, int8_inputs=True)
    return torch.stack([reference.logits(window) for window in ids])


def kuiper(folder, ids):
    reference = Reference(open_kuiper(folder / "model.bin"), 1e4, 1e-5, interleaved=True, int8_inputs=False)
    return torch.stack([reference.logits(window) for window in ids])


def unpacked(words, bits, dim, places):
    """Codes of int32 words along a dimension; `places[k]` is where in its word the k-th of neighbouring codes lies."""
    lanes = torch.stack([(words.long() & 0xFFFFFFFF) >> (bits * place) & (2**bits - 1) for place in places], dim + 1)
    return lanes.flatten(dim, dim + 1)


def int32_words(folder, ids):
    """The folder's weights dequantized by the formats' definitions, in the plain model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    words = config.quantization_config
    del config.quantization_config
    state = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
        q, z, scale = (state.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        awq = words["quant_method"] == "awq"
        places = (0, 4, 1, 5, 2, 6, 3, 7) if awq else range(32 // words["bits"])
        codes, zero = unpacked(q, words["bits"], 1 if awq else 0, places), unpacked(z, words["bits"], 1, places)
        zero = zero + (words.get("checkpoint_format") == "gptq")
        group = torch.arange(len(codes)) // (len(codes) // len(scale)) if awq else state.pop(f"{name}.g_idx").long()
        state[f"{name}.weight"] = ((codes - zero[group]).float() * scale[group].float()).t()
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.tie_weights()
    with torch.no_grad():
        return model(ids).logits


RELOADED = {
    "gptq": int32_words,
    "awq": int32_words,
    "compressed-tensors": compressed_tensors,
    "gguf": gguf,
    "llama2c": llama2c,
    "kuiper": kuiper,
}
