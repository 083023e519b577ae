"""AWQ checkpoints: what transformers and vLLM load as ``quant_method: awq``, in the form of its GEMM kernel.

Expresses: weights int of 4 bits in groups, with zero points or without, one format for all Linears of the blocks. Inputs are left
alone. A symmetric weight is stored with the zero point 8.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ptq.config.schema import SchemeConfig
from ptq.export.base import Exported
from ptq.export.packing.int32_folder import check, unsigned, with_fp16_scales, write
from ptq.export.packing.int32_words import AWQ_ORDER, words
from ptq.export.quantized_tensors import LinearTensors, QuantizedTensors
from ptq.network.network import Network
from quantize.spec.quant_spec import QuantSpec

NAME = "awq"
BITS = 4
ALLOWED = {"bits": (BITS,), "granularity": ("group",)}
EXAMPLE = "w4a16_g64 bits: 4, granularity: group, group_size: 64, symmetric: false"


@dataclass(frozen=True)
class Options:
    """No options: the scheme says everything."""


class Exporter:
    """Writes a folder: safetensors, config.json, the tokenizer's files."""

    filename = ""

    def __init__(self, options: Options):
        self.options = options

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme` with scales that are exact in fp16."""
        return with_fp16_scales(scheme)

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses other formats, and more than one."""
        check(scheme, network, NAME, ALLOWED, EXAMPLE)
        return ()

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the folder, a shard in memory at a time."""
        self.check(source.scheme, source.network)
        return write(source, path, _linear, _config)


def _linear(tensors: LinearTensors) -> Mapping[str, torch.Tensor]:
    """Returns codes (in, out) and zero points (groups, out) packed along the outputs, and scales (groups, out)."""
    codes, scale, zero = unsigned(tensors)
    return {
        "qweight": words(codes.t(), BITS, 1, AWQ_ORDER), "qzeros": words(zero.t(), BITS, 1, AWQ_ORDER),
        "scales": scale.t().contiguous(),
    }  # fmt: skip


def _config(spec: QuantSpec, left: list[str]) -> dict[str, Any]:
    return {
        "quant_method": NAME, "bits": BITS, "group_size": spec.group_size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": left or None,
    }  # fmt: skip
