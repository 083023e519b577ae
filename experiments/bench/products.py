"""What `quantize.kernels.matmul` gains over torch's own products of matrices on this machine's CPU.

    python -m experiments.bench.products [--rounds 5]

Sizes are those of SmolLM2-135M with 2048 tokens; both sides in turn, medians of the rounds.
"""

import argparse
from functools import partial

import torch
from torch.nn import functional

from experiments.bench.speed import in_turn
from quantize.kernels.matmul import add_gram, product

TOKENS = 2048
SHAPES = ((576, 576), (1536, 576), (576, 1536))
"""(out, in) of Linears."""


def main() -> None:
    """Prints both sides' rates and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        for out, inner in SHAPES:
            x, w = torch.randn(TOKENS, inner).to(kind), torch.randn(out, inner).to(kind)
            seconds = in_turn(partial(product, x, w.t()), partial(functional.linear, x, w), rounds)
            _report(
                f"{str(kind).removeprefix('torch.')}, Linear {inner} -> {out}", 2e-9 * TOKENS * out * inner, seconds
            )
    for channels in (576, 1536):
        x, total = torch.randn(TOKENS, channels), torch.zeros(channels, channels)
        seconds = in_turn(partial(add_gram, total, x), partial(total.addmm_, x.t(), x), rounds)
        _report(f"X^T X of {channels} channels", 2e-9 * TOKENS * channels**2, seconds)


def _report(what: str, work: float, seconds: tuple[float, float, float]) -> None:
    ours, torchs, ratio = seconds
    print(
        f"{what}, {TOKENS} tokens: ours {work / ours:.0f} GFLOP/s, torch's {work / torchs:.0f}: {ratio:.3f} of the time"
    )


if __name__ == "__main__":
    main()
