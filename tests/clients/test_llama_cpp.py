"""llama.cpp itself on our files (make test-clients): its losses on two windows against ours."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from ptq.config.building import recipe_from
from ptq.config.schema import TextConfig
from ptq.data.sampling import sample_tokens
from ptq.run.experiment import run
from ptq.testing import byte_tokenizer

LIBRARIES = os.environ.get("PTQ_LLAMA_CPP", "")
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "bench" / "llama_cpp.py"
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="PTQ_LLAMA_CPP names no folder of llama.cpp: make test-clients")
TEXT = "def f(x):\n    return x ** 2  # naïve\n"


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_llama_cpp_has_our_perplexity_within_half_a_percent(tmp_path, tiny_llama, bits, symmetric):
    weight = {"bits": bits, "granularity": "group", "group_size": 32, "symmetric": symmetric}
    recipe = recipe_from(
        {
            "name": "client", "model": {"path": str(tiny_llama)}, "evaluation": {"windows": 2, "length": 256},
            "calibration": {"samples": 1, "length": 64}, "steps": {"rtn": {}}, "scheme": {"weight": weight},
            "export": {"format": "gguf"}, "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
        }
    )  # fmt: skip
    folder = run(recipe)
    ids = sample_tokens(byte_tokenizer(), TextConfig(split="test"), 2, 256, "contiguous", 0, False, None, "data").ids
    request = {"model": str(folder / "export" / "gguf" / "model.gguf"), "windows": ids.tolist(), "text": TEXT}
    command = [sys.executable, SCRIPT, LIBRARIES]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    ours = json.loads((folder / "metrics.json").read_text())["window_losses"]["quantized"]
    ratio = math.exp(torch.tensor(answer["losses"]).mean() - torch.tensor(ours).mean())
    assert abs(ratio - 1) < 0.005
    assert answer["tokens"] == byte_tokenizer()(TEXT, add_special_tokens=False).input_ids
