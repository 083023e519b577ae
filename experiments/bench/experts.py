"""A mixture's forward pass with its experts as Linears, over the fused one: `python -m experiments.bench.experts`.

Three ways in turn, the least of several times of each: what transformers runs by itself (``grouped_mm``), its own loop over
experts (``eager``), and the same loop through Linears. Random weights of one block's shapes; which expert sees what is random too.
"""

import argparse
import time
from typing import Any

import torch
import transformers

from ptq.network.network import build_network

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "tiny": {"hidden_size": 128, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2},
}


def main() -> None:
    """Prints seconds a pass and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    options = {
        "vocab_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = transformers.AutoConfig.for_model("qwen3_moe", **options, **SHAPES[asked.shape])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(64, (1, asked.tokens))
    least: dict[str, float] = {}
    for way in ("grouped_mm", "eager", "linears"):
        if way == "linears":
            build_network(model)
        else:
            model.set_experts_implementation(way)
        least[way] = min(_seconds(model, ids) for _ in range(asked.repeats + 1))
    for way, seconds in least.items():
        print(f"{way:12} {seconds:8.4f} s   linears / {way}: {least['linears'] / seconds:.3f}")


@torch.no_grad()
def _seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
