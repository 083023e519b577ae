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

    return loaded(
        model,
        "bitsandbytes NF4",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )


def loaded(model: Any, name: str, **options: Any) -> Side:
    """Returns the side `name` of the model as transformers loads it with these options of bitsandbytes."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(pathlib.Path(folder))
        config = transformers.BitsAndBytesConfig(**options)
        made = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}
        )
    return dataclasses.replace(side_of(name, made), weight_bytes=None, head_bytes=None, read_bytes=None)
