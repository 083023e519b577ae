"""GPTQ checkpoints: what transformers (with gptqmodel) and vLLM load as ``quant_method: gptq``.

Expresses: weights int of 2, 4 or 8 bits in groups or per channel, one format for all Linears of the blocks; symmetric ones in
the first form of the checkpoint, ones with zero points in ``gptq_v2``, whose zero points may be 0; a head that is not tied to the
embedding in the same format (``lm_head``, which vLLM reads). Inputs are left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ptq.export.packing.int32_folder import FolderExporter, unsigned
from ptq.export.packing.int32_words import words
from ptq.export.quantized_tensors import LinearTensors
from quantize.spec.quant_spec import QuantSpec

NAME = "gptq"


@dataclass(frozen=True)
class Options:
    """No options: the scheme says everything."""


class Exporter(FolderExporter):
    """Writes a folder: safetensors, config.json, the tokenizer's files."""

    name = NAME
    allowed: ClassVar = {"bits": (2, 4, 8), "granularity": ("channel", "group")}
    example = "w4a16_g64 bits: 4, granularity: group, group_size: 64, symmetric: false"
    heads = True

    def packed(self, tensors: LinearTensors) -> Mapping[str, torch.Tensor]:
        """Returns codes packed along the inputs, zero points along the outputs, scales (groups, out), and each column's group."""
        codes, scale, zero = unsigned(tensors)
        spec = tensors.spec
        bits = 4 if spec is None else spec.bits
        # The first form stores zero points less one, and its readers add it again.
        less = 1 if spec is not None and spec.symmetric else 0
        size = codes.shape[1] // scale.shape[1]
        return {
            "qweight": words(codes.t(), bits, 0), "qzeros": words(zero.t() - less, bits, 1), "scales": scale.t().contiguous(),
            "g_idx": torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) // size,
        }  # fmt: skip

    def quantization_config(self, spec: QuantSpec, left: list[str]) -> dict[str, Any]:
        """Returns the ``quantization_config``."""
        found: dict[str, Any] = {
            "quant_method": NAME, "bits": spec.bits, "group_size": spec.group_size or -1, "sym": spec.symmetric, "desc_act": False,
            "checkpoint_format": "gptq" if spec.symmetric else "gptq_v2", "lm_head": False,
        }  # fmt: skip
        # A rule that begins with a minus leaves a module alone.
        return {**found, "dynamic": {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in left}} if left else found
