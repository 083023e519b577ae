"""The file of a model that another runtime reads: its weights rounded to nearest, written by one of our exporters."""

import copy
import pathlib
from typing import Any

from ptq.config.shipped import scheme_named
from ptq.export.quantized_tensors import ResidentSource
from ptq.network.network import build_network
from ptq.run.in_memory import quantize


def exported(model: Any, tokenizer: Any, exporter: Any, scheme: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes a copy of `model`, rounded to the shipped `scheme`, whose inputs have no static ranges; returns where to, inside `folder`."""
    adapted = exporter.adapt(scheme_named(scheme))
    made = copy.deepcopy(model)
    network = build_network(made)
    quantize(made, adapted, {"rtn": {}}, None)
    path = folder / exporter.filename
    exporter.write(ResidentSource(network, tokenizer, adapted), path)
    return path
