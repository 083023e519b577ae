"""bitsandbytes: LLM.int8(), int8 weights and inputs with the outlier columns in floating point."""

from typing import Any

from ptq.bench.against.bitsandbytes import INSTALL, NEEDS, loaded
from ptq.bench.side import Side

__all__ = ["INSTALL", "NEEDS", "side"]


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of the model as transformers loads it with bitsandbytes in 8 bits."""
    return loaded(model, "bitsandbytes LLM.int8()", load_in_8bit=True)
