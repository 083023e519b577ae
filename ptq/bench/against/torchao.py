"""torchao: int8 weights a channel, inputs rounded to int8 a token at each call."""

import copy
import dataclasses
from typing import Any

from ptq.bench.side import Side, side_of

NEEDS = ("torchao",)
INSTALL = "pip install torchao"


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of a copy whose Linears torchao has quantized, the head left alone."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = copy.deepcopy(model)
    quantize_(
        made,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda m, name: hasattr(m, "in_features") and "head" not in name,
    )
    return dataclasses.replace(side_of("torchao", made), weight_bytes=None, head_bytes=None, read_bytes=None)
