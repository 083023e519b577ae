"""bitsandbytes: NF4 weights in blocks of 64, decoded or multiplied by its own kernels."""

import dataclasses
import pathlib
import tempfile
from typing import Any

from ptq.bench.side import Side, side_of

NEEDS = ("bitsandbytes",)
INSTALL = "pip install bitsandbytes"


def side(model: Any, tokenizer: Any) -> Side:
    """Returns the side of the model as transformers loads it with bitsandbytes in 4 bits."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(pathlib.Path(folder))
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        made = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}
        )
    return dataclasses.replace(side_of("bitsandbytes NF4", made), weight_bytes=None, head_bytes=None, read_bytes=None)
