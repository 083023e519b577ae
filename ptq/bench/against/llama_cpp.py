"""llama.cpp through llama-cpp-python, on the same model's weights in Q8_0."""

import pathlib
import tempfile
from typing import Any

import torch

from ptq.bench.side import Side
from ptq.config.shipped import scheme_named
from ptq.export.quantized_tensors import ResidentSource
from ptq.export.to_gguf import Exporter, Options
from ptq.network.network import build_network
from ptq.run.in_memory import quantize

NEEDS = ("llama_cpp",)
INSTALL = "pip install llama-cpp-python"
SCHEME = "w8a16_g32"
CONTEXT = 4096


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of the model as llama.cpp reads it from a file that is written here."""
    import copy

    from llama_cpp import Llama

    exporter = Exporter(Options())
    scheme = exporter.adapt(scheme_named(SCHEME))
    made = quantize(copy.deepcopy(model), scheme, {"rtn": {}}, None).model
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / exporter.filename
        exporter.write(ResidentSource(build_network(made), tokenizer, scheme), path)
        threads = torch.get_num_threads()
        llama = Llama(
            str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill(ids: torch.Tensor) -> object:
        llama.reset()
        return llama.eval(ids[0].tolist())

    def decode(ids: torch.Tensor, tokens: int) -> object:
        prefill(ids)
        last = 0
        for _ in range(tokens):
            last = llama.sample(temp=0.0)
            llama.eval([last])
        return last

    return Side("llama.cpp Q8_0", prefill, decode, batches=False, note="one sequence at a time")
