"""The other side of gptq_speed.py: llm-compressor's GPTQ, in its own environment. Prints one line of JSON.

    PYTHON experiments/bench/llmcompressor_gptq.py MODEL_FOLDER TOKENS.safetensors BATCH_SIZE

Imports nothing of this project: it runs where only llm-compressor is installed.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Runs GPTQ, W4A16 asymmetric in groups of 64, on the given tokens, and times it."""
    folder, tokens, batch_size = sys.argv[1], load_file(sys.argv[2])["ids"], int(sys.argv[3])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 64,
        "actorder": None,
    }
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        block_size=128,
        dampening_frac=0.01,
        actorder=None,
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        batch_size=batch_size,
    )
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
