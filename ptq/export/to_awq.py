"""AWQ checkpoints: what transformers and vLLM load as ``quant_method: awq``, in the form of its GEMM kernel.

Expresses: weights int of 4 bits in groups, with zero points or without, one format for all Linears of the blocks. Inputs are left
alone. A symmetric weight is stored with the zero point 8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ptq.export.packing.int32_folder import FolderExporter, unsigned
from ptq.export.packing.int32_words import AWQ_ORDER, words
from ptq.export.quantized_tensors import LinearTensors
from quantize.spec.quant_spec import QuantSpec

NAME = "awq"
BITS = 4


@dataclass(frozen=True)
class Options:
    """No options: the scheme says everything."""


class Exporter(FolderExporter):
    """Writes a folder: safetensors, config.json, the tokenizer's files."""

    name = NAME
    allowed: ClassVar = {"bits": (BITS,), "granularity": ("group",)}
    example = "w4a16_g64 bits: 4, granularity: group, group_size: 64, symmetric: false"

    def packed(self, tensors: LinearTensors) -> Mapping[str, torch.Tensor]:
        """Returns codes (in, out) and zero points (groups, out) packed along the outputs, and scales (groups, out)."""
        codes, scale, zero = unsigned(tensors)
        return {
            "qweight": words(codes.t(), BITS, 1, AWQ_ORDER), "qzeros": words(zero.t(), BITS, 1, AWQ_ORDER),
            "scales": scale.t().contiguous(),
        }  # fmt: skip

    def quantization_config(self, spec: QuantSpec, left: list[str]) -> dict[str, Any]:
        """Returns the ``quantization_config``."""
        return {
            "quant_method": NAME, "bits": BITS, "group_size": spec.group_size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": left or None,
        }  # fmt: skip
