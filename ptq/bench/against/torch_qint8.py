"""torch's dynamic quantization: int8 weights, inputs rounded to 8 bits a tensor at each call."""

import copy
import warnings
from typing import Any

import torch

from ptq.bench.side import Side, side_of

NEEDS = ("torch.ao.quantization",)
INSTALL = "install a torch that has torch.ao.quantization"


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of a copy whose Linears torch has quantized."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        made = quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    return _bare(side_of("torch-qint8", made, "one range a tensor of input, the head quantized too"))


def _bare(side: Side) -> Side:
    import dataclasses

    return dataclasses.replace(side, weight_bytes=None, head_bytes=None, read_bytes=None)
