"""What a quantized cache takes beside fp16, held for real, and what one simulated attention needs at its peak, by window.

python -m experiments.bench.cache
"""

import argparse
import pathlib
import subprocess
import sys

import torch
from torch import nn
from transformers import DynamicCache

from ptq.config.shipped import scheme_named
from ptq.integrations.cache import PackedLayer, cache_size
from ptq.network.attention import (
    AttentionQuantizers,
    CacheFormats,
    attach_quantizers,
    cache_format,
    simulated_attention,
)

LAYERS, QUERIES, HEADS, CHANNELS = 30, 9, 3, 64
"""SmolLM2-135M's attention."""
SCHEMES = ("kv4", "kv2")
WINDOWS = (1024, 4096, 8192)


def quantizers_of(name: str) -> AttentionQuantizers:
    """Returns the quantizers of one attention under a shipped scheme."""
    scheme = scheme_named(name)
    if scheme.cache is None or scheme.key is None or scheme.value is None:
        raise ValueError(f"{name}: has no cache of keys and values")
    key, value = (cache_format(scheme.cache, spec, CHANNELS) for spec in (scheme.key, scheme.value))
    return AttentionQuantizers({}, None, CacheFormats(key, value))


def held(name: str, tokens: int) -> str:
    """Fills a cache in fp16 arithmetic, a prompt and then tokens one by one; returns a row of the table."""
    quantizers = quantizers_of(name)
    cache = DynamicCache()
    layers = [PackedLayer(quantizers) for _ in range(LAYERS)]
    cache.layers = [*layers]
    generator = torch.Generator().manual_seed(0)
    for count in (tokens - 16, *[1] * 16):
        states = torch.randn(1, HEADS, count, CHANNELS, generator=generator).half()
        for layer in layers:
            layer.update(states, states)
    size = cache_size(cache)
    plain = 2 * size.values
    return (
        f"| {name} | {tokens} | {plain / 1e6:.2f} MB | {size.nbytes / 1e6:.2f} MB | {plain / size.nbytes:.2f} x | "
        f"{size.bits_per_value:.2f} |"
    )


def peak(name: str, tokens: int) -> None:
    """Prints by how many MiB one attention over a window of `tokens` grows this process at its peak, as Linux counts it."""
    module = nn.Module()
    attach_quantizers(module, quantizers_of(name))
    query, key = (torch.randn(1, heads, tokens, CHANNELS) for heads in (QUERIES, HEADS))
    simulated_attention(module, query[:, :, :64], key[:, :, :64], key[:, :, :64], None)
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = _peak()
    simulated_attention(module, query, key, key, None)
    print(f"{(_peak() - before) / 1024:.0f}")


def _peak() -> int:
    """Returns the greatest resident memory of this process since it was last forgotten, KiB."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Prints both tables, or one figure of the second for the process that is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", nargs=2, metavar=("SCHEME", "TOKENS"), help="measure one attention in this process")
    asked = parser.parse_args().peak
    if asked:
        peak(asked[0], int(asked[1]))
        return
    print("| scheme | tokens | fp16 | held | ratio | bits a value |\n|---|---|---|---|---|---|")
    for name in SCHEMES:
        for tokens in WINDOWS:
            print(held(name, tokens))
    print("\n| scheme | window | peak of one attention | scores of a whole window |\n|---|---|---|---|")
    for tokens in WINDOWS:
        command = [sys.executable, "-m", "experiments.bench.cache", "--peak", SCHEMES[0], str(tokens)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"| {SCHEMES[0]} | {tokens} | {found} MiB | {QUERIES * tokens**2 * 4 >> 20} MiB |")


if __name__ == "__main__":
    with torch.no_grad():
        main()
