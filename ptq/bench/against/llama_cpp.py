"""llama.cpp on the same model's weights in Q8_0, by its shared libraries in the folder that `PTQ_LLAMA_CPP` names."""

import os
import pathlib
import tempfile
from typing import Any

import torch

from ptq.bench.processes.exported import exported
from ptq.bench.processes.llama_process import LlamaProcess
from ptq.bench.side import Side
from ptq.export.to_gguf import Exporter, Options

NEEDS = ("$PTQ_LLAMA_CPP",)
INSTALL = "python experiments/bench/llama_cpp.py --fetch FOLDER, and name that folder in PTQ_LLAMA_CPP"
SCHEME = "w8a16_g32"
CONTEXT = 4096


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of the model as llama.cpp reads it from a file that is written here."""
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, tokenizer, Exporter(Options()), SCHEME, pathlib.Path(folder))
        libraries = pathlib.Path(os.environ["PTQ_LLAMA_CPP"]).expanduser()
        llama = LlamaProcess(libraries, path, torch.get_num_threads(), CONTEXT)

    def prefill(ids: torch.Tensor) -> object:
        return llama.generate(ids[0].tolist(), 0)

    def decode(ids: torch.Tensor, tokens: int) -> object:
        return llama.generate(ids[0].tolist(), tokens)

    return Side("llama.cpp Q8_0", prefill, decode, batches=False, note="one sequence at a time")
