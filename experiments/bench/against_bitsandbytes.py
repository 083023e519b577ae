"""NF4 and LLM.int8() beside bitsandbytes on the CPU.

    PTQ_BITSANDBYTES=<site-packages with bitsandbytes> python -m experiments.bench.against_bitsandbytes

bitsandbytes is no dependency: install it elsewhere, with the same torch (``pip install torch==2.13.0 bitsandbytes``), and name
that environment's site-packages. Two comparisons:

- NF4 on random layers: codes and absmax, element by element.
- LLM.int8() on the windows of the protocol smol-wt2: SmolLM2-135M with its blocks' Linears computed by this project and by
  bitsandbytes; perplexity, and mean KL divergence from the baseline, which is far less noisy.
"""

import argparse
import importlib
import logging
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from experiments.smol_wt2 import TOKENIZER, write_tokenizer
from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.data.sampling import Draw
from ptq.errors import UserError
from ptq.files.store import Store
from ptq.models.loading import load
from ptq.network.network import build_network, replace_module, weight_of
from quantize.codecs.packing import unpack
from quantize.codecs.registry import codec_of
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import spec_of

LAYERS = 100
BLOCK = 64
THRESHOLD = 6.0


def bitsandbytes() -> Any:
    """Returns the package bitsandbytes. Raises `UserError` when it is not where PTQ_BITSANDBYTES says."""
    if place := os.environ.get("PTQ_BITSANDBYTES"):
        sys.path.append(place)
    # It would say at each call that it rounds its inputs to fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"PTQ_BITSANDBYTES: no bitsandbytes there ({error}): name the site-packages that holds it"
        ) from None


def nf4(bnb: Any) -> tuple[int, int, int]:
    """Returns over `LAYERS` random layers: codes that differ, absmax values that differ, and how many codes there are."""
    generator = torch.Generator().manual_seed(0)
    spec = spec_of("nf4", group_size=BLOCK)
    codes_differ = scales_differ = total = 0
    for _ in range(LAYERS):
        rows = 8 * int(torch.randint(1, 65, (), generator=generator))
        columns = BLOCK * int(torch.randint(1, 33, (), generator=generator))
        weight = torch.randn(rows, columns, generator=generator) * torch.rand((), generator=generator)
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        # The earlier code lies in the upper half of a byte there, in the lower half here.
        theirs = torch.stack([packed >> 4, packed & 15], dim=-1).view(rows, columns)
        stored = codec_of(spec).encode(weight, spec)
        ours = unpack(stored["codes"], 4, columns)
        codes_differ += int((ours != theirs).sum())
        scales_differ += int((stored["scale"].flatten() != state.absmax).sum())
        total += weight.numel()
    return codes_differ, scales_differ, total


class Theirs(nn.Module):
    """A Linear by bitsandbytes' LLM.int8()."""

    def __init__(self, bnb: Any, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.bias = bias
        self.state = bnb.MatmulLtState()
        # While training it multiplies by the dequantized weight instead on a CPU.
        self.state.threshold, self.state.has_fp16_weights, self.state.is_training = THRESHOLD, False, False
        self.state.CB, self.state.SCB, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        self._matmul = bnb.matmul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        y: torch.Tensor = self._matmul(x, self.state.CB, bias=self.bias, state=self.state)
        return y


@torch.no_grad()
def llm_int8(bnb: Any, windows: int | None) -> list[str]:
    """Returns a line each for the baseline, ours and theirs: perplexity, ratio, mean KL from the baseline in nats a token."""
    write_tokenizer(TOKENIZER)
    [job] = compose_jobs(catalog.locate("smollm2-135m_llm-int8"), ["data=smol-wt2", f"model.tokenizer={TOKENIZER}"])
    recipe = job.recipe
    loaded = load(recipe.model, recipe.execution, Store(pathlib.Path(recipe.store).expanduser()))
    network = build_network(loaded.model)
    e = recipe.evaluation
    ids = Draw(recipe.data.evaluation, windows or e.windows, e.length, bos=e.bos).tokens(loaded.tokenizer).ids
    plain = dict(network.linears)
    inputs = spec_of("llm_int8", activation=True, threshold=THRESHOLD)
    forms: dict[str, Mapping[str, nn.Module]] = {
        "baseline": plain,
        "ours": {
            n: QuantLinear(weight_of(m), _bias(m), spec_of("int"), InputQuantizer(inputs)) for n, m in plain.items()
        },
        "bitsandbytes": {n: Theirs(bnb, weight_of(m), _bias(m)) for n, m in plain.items()},
    }
    losses, divergences = dict.fromkeys(forms, 0.0), dict.fromkeys(forms, 0.0)
    for window in ids:
        first: torch.Tensor | None = None
        for label, modules in forms.items():
            for name, module in modules.items():
                replace_module(loaded.model, name, module)
            logits = loaded.model(input_ids=window[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            first = logits if first is None else first
            losses[label] += nn.functional.nll_loss(logits, window[1:]).item() / len(ids)
            divergences[label] += (first.exp() * (first - logits)).sum(-1).mean().item() / len(ids)
    base = losses["baseline"]
    return [
        f"{label}: perplexity {math.exp(loss):.4f}, {math.exp(loss - base):.4f} x, KL {divergences[label]:.5f}"
        for label, loss in losses.items()
    ]


def _bias(module: nn.Module) -> torch.Tensor | None:
    return module.bias if isinstance(module.bias, torch.Tensor) else None


def main() -> None:
    """Prints both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, help="windows of the perplexities (default: the protocol's 16)")
    options = parser.parse_args()
    bnb = bitsandbytes()
    print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}")
    codes, scales, total = nf4(bnb)
    print(
        f"NF4, {LAYERS} random layers: {codes} of {total} codes and {scales} of {total // BLOCK} absmax values differ"
    )
    print("\n".join(llm_int8(bnb, options.windows)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
