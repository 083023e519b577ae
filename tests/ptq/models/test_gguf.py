"""GGUF files: read once, kept in the store, and the same bits as read directly, whatever happens to the store."""

import json
import pathlib
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, GGUFTensor, LlamaTensorProcessor

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.files.gguf_header import check_gguf, tensors_of
from ptq.files.store import Store
from ptq.models.gguf_weights import convert_gguf
from ptq.models.loading import check, load, load_tokenizer
from ptq.models.locations import source_of
from ptq.testing import byte_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[3]
CPU = ExecutionConfig(device="cpu")
HEADS, VOCABULARY = 2, 259


def write_gguf(
    path: pathlib.Path,
    seed: int = 0,
    scale: float = 0.2,
    vocabulary: int = VOCABULARY,
    widths: tuple[int, int] = (32, 64),
) -> ModelConfig:
    """Writes a random LLaMA of one block in Q8_0 with a byte tokenizer; `widths` are those of the stream and inside the MLP."""
    hidden, inner = widths
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(token for token, _ in tokens), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    shapes = {"token_embd": (vocabulary, hidden), "output": (vocabulary, hidden)}
    shapes |= {f"blk.0.attn_{x}": (hidden, hidden) for x in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        values = (scale * random.standard_normal(shape)).astype(np.float32)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", random.standard_normal(hidden).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelConfig(str(path))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A tiny GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def parsed(monkeypatch):
    """Counts how often transformers parses a GGUF file."""
    calls = []
    original = gguf.GGUFReader.__init__

    def count(self, *arguments, **options):
        calls.append(arguments)
        original(self, *arguments, **options)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    return calls


def same(one, other):
    """Whether two loaded models have the same weights, tokens and provenance."""
    pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
    text = "for x in y:\n\t# Größe"
    return (
        all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
        and one.tokenizer(text).input_ids == other.tokenizer(text).input_ids
        and one.tokenizer.special_tokens_map == other.tokenizer.special_tokens_map
        and (one.fingerprint, one.baseline_dtype, one.location)
        == (other.fingerprint, other.baseline_dtype, other.location)
    )


def test_a_gguf_file_out_of_the_store_is_the_same_model_and_is_parsed_no_more(config, tmp_path, parsed):
    direct = load(config, CPU)
    store = Store(tmp_path)
    assert same(load(config, CPU, store), direct)
    parsed.clear()
    again = load(config, CPU, store)
    assert same(again, direct) and check(config, store).model_type == "llama" and load_tokenizer(config, store)
    assert parsed == []
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, direct.model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_converted_gguf_file_is_the_folder_that_transformers_would_save_of_it(config, tmp_path, dtype):
    assert convert_gguf(source_of(config), check(config), dtype, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(
        pathlib.Path(config.path).parent, gguf_file=pathlib.Path(config.path).name, dtype=torch.float32
    )
    for owner, name in ((theirs.config, "quantization_config"), (theirs, "hf_quantizer")):
        del owner.__dict__[name]
    theirs.is_quantized = False
    theirs.to(dtype).save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / x / "model.safetensors") for x in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(ours[name].dtype == dtype and ours[name].equal(expected[name]) for name in expected)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q6_K"])
def test_tensors_lie_where_ggufs_reader_finds_them(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    unwritten = kind == gguf.GGMLQuantizationType.Q6_K  # gguf reads it, and has nothing that writes it
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", ""])
    rng = np.random.default_rng(0)
    for name, shape in (("b.weight", (3, 256)), ("a.weight", (2, 2, 512)), ("c.bias", (256,))):
        values = rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(
            name,
            np.zeros(gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
            if unwritten
            else gguf.quantize(values, kind),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    found = tensors_of(tmp_path / "a.gguf")
    assert [(t.name, t.shape, t.kind, t.offset, t.size) for t in found] == [
        (t.name, tuple(int(n) for n in t.shape)[::-1], t.tensor_type, t.data_offset, t.n_bytes) for t in expected
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_gguf_file_becomes_a_model_in_little_more_than_the_models_own_memory(tmp_path):
    config = write_gguf(tmp_path / "wide.gguf", widths=(1536, 6144))
    command = [sys.executable, "-m", "experiments.bench.loading", "--form", "GGUF as a run", "--folder", config.path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["tensors"] > 120e6 and got["all"] <= 1.25 * got["tensors"]


def test_a_gguf_file_whose_weights_are_made_of_several_tensors_is_left_to_transformers(config, tmp_path, monkeypatch):
    direct = load(config, CPU)

    class Several(LlamaTensorProcessor):
        def process(self, weights, name, **options):
            return GGUFTensor(weights, None, {}) if "ffn_up" in name else super().process(weights, name, **options)

    monkeypatch.setitem(TENSOR_PROCESSORS, "llama", Several)
    assert not convert_gguf(source_of(config), check(config), torch.float16, tmp_path / "none")
    assert not list((tmp_path / "none").glob("*"))
    monkeypatch.undo()
    monkeypatch.setattr("ptq.models.gguf_weights.convert_gguf", lambda *arguments: False)
    assert same(load(config, CPU, Store(tmp_path / "store")), direct)


@pytest.mark.parametrize("harm", ["cut", "changed", "deleted", "emptied"])
def test_a_harmed_store_is_mended_and_never_believed(config, tmp_path, harm):
    direct, store = load(config, CPU), Store(tmp_path)
    load(config, CPU, store)
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        if harm == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif harm == "changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "emptied":
            path.write_bytes(b"")
        else:
            path.unlink()
    assert same(load(config, CPU, store), direct)


def test_another_file_under_the_same_name_is_another_entry(tmp_path):
    path, store = tmp_path / "x.gguf", Store(tmp_path / "store")
    first = load(write_gguf(path), CPU, store)
    second = load(write_gguf(path, seed=1), CPU, store)
    assert first.fingerprint != second.fingerprint
    assert not torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)
    assert check(write_gguf(path, vocabulary=300), store).vocab_size == 300


def test_another_release_of_transformers_does_not_share_what_was_read(config, tmp_path, monkeypatch):
    store = Store(tmp_path)
    check(config, store)
    check(config, store)
    assert len(list((tmp_path / "gguf-config").iterdir())) == 1
    monkeypatch.setattr("ptq.models.loading.version_of", lambda name: "999.0")
    check(config, store)
    assert len(list((tmp_path / "gguf-config").iterdir())) == 2


def test_the_dtype_that_was_asked_for_is_kept_apart(config, tmp_path):
    store = Store(tmp_path)
    load(config, CPU, store)
    exact = load(ModelConfig(config.path, dtype="float32"), CPU, store)
    direct = load(ModelConfig(config.path, dtype="float32"), CPU)
    assert exact.baseline_dtype == "fp32" and same(exact, direct)


def test_weights_beyond_fp16_become_bf16_also_through_the_store(tmp_path):
    config, store = write_gguf(tmp_path / "big.gguf", scale=1e5), Store(tmp_path / "store")
    direct, kept = load(config, CPU), load(config, CPU, store)
    assert kept.baseline_dtype == "bf16" and same(kept, direct)
    assert not [path.name for path in (tmp_path / "store").rglob(".*")]


def test_a_gguf_file_in_the_store_can_be_offloaded(config, tmp_path):
    store = Store(tmp_path)
    offloaded = load(config, ExecutionConfig(device="cpu", weights="offloaded"), store)
    resident, ids = load(config, CPU, store), torch.arange(12)[None]
    assert all(p.device.type == "meta" for p in offloaded.model.parameters())
    with torch.no_grad(), offloaded.weights.hold([""]):
        assert torch.equal(offloaded.model(input_ids=ids).logits, resident.model(input_ids=ids).logits)
    with pytest.raises(UserError, match="no store to keep it in"):
        load(config, ExecutionConfig(device="cpu", weights="offloaded"))


def test_a_gguf_file_that_was_cut_short_is_refused_though_the_store_holds_its_config(config, tmp_path):
    store = Store(tmp_path / "store")
    load(config, CPU, store)
    cut = pathlib.Path(shutil.copy(config.path, tmp_path / "tiny.gguf"))
    header = check_gguf(cut)
    whole = cut.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 3, 0):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated"):
            check(ModelConfig(str(cut)), store)
    assert len(header) == 64
