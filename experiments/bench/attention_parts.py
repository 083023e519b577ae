"""What `quantize.kernels.attention_parts` gains over torch's own causal attention on this machine's CPU.

    python -m experiments.bench.attention_parts [--rounds 5]

Heads of SmolLM2-135M, of OPT-1.3B and of LLaMA-3-8B, float32; both sides in turn, medians of the rounds.
"""

import argparse
from functools import partial

import torch
from torch.nn import functional

from experiments.bench.speed import in_turn
from quantize.kernels.attention_parts import LONGEST, PART, attention_in_parts

HEADS = ((9, 3, 64), (32, 32, 64), (32, 8, 128))
"""(heads, kv heads, channels of a head)."""
TOKENS = (3 * PART, 4 * PART, 512, 768, LONGEST)


def main() -> None:
    """Prints the ratio of both sides' times for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for heads, kv_heads, channels in HEADS:
        for tokens in TOKENS:
            q, k, v = (torch.randn(1, tokens, n, channels).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
            usual = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            ours, torchs, ratio = in_turn(partial(attention_in_parts, q, k, v), usual, rounds)
            print(
                f"{heads} heads of {channels}, {kv_heads} of keys, {tokens} tokens: in parts {1e3 * ours:.2f} ms, "
                f"torch's {1e3 * torchs:.2f} ms: {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
