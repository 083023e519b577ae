"""onnxruntime-genai on the same model, in 4 bits with groups of 32 as its own builder writes it for CPUs, inputs of products in int8."""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import torch

from ptq.bench.side import Side
from ptq.errors import UserError

NEEDS = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir")
INSTALL = "pip install onnxruntime-genai onnxruntime onnx onnx_ir"
ACCURACY = "int4_accuracy_level=4"
"""The builder's words for int8 inputs of products."""


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of the model as onnxruntime-genai's builder writes it."""
    import onnxruntime_genai

    with tempfile.TemporaryDirectory() as folder:
        plain, made = pathlib.Path(folder) / "plain", pathlib.Path(folder) / "made"
        model.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        asked = ["-i", str(plain), "-o", str(made), "-p", "int4", "-e", "cpu", "-c", str(plain)]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *asked, "--extra_options", ACCURACY]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"--against: onnxruntime-genai does not build this model: {last}")
        _set_threads(made / "genai_config.json", torch.get_num_threads())
        runtime = onnxruntime_genai.Model(str(made))

    def decode(ids: torch.Tensor, tokens: int) -> object:
        options = onnxruntime_genai.GeneratorParams(runtime)
        length = ids.shape[1] + tokens
        options.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(ids))
        generator = onnxruntime_genai.Generator(runtime, options)
        generator.append_tokens(ids.numpy().astype(np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
        return [list(generator.get_sequence(i)) for i in range(len(ids))]

    return Side(
        "onnxruntime-genai",
        lambda ids: decode(ids, 1),
        decode,
        note="4 bits in groups of 32 with int8 inputs, the head too",
    )


def _set_threads(path: pathlib.Path, threads: int) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config), encoding="utf-8")
