"""Experts that are published in MXFP4 (gpt-oss): read as the numbers that their codes and scales stand for, one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ptq.files.safetensors_file import StoredTensor, TensorDigests
from ptq.models.stored.stacked import StackedTensor
from quantize.codecs.base import packed_codes
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec

SPEC = QuantSpec(4, format="mxfp4", granularity="group", group_size=32)
METHOD = "mxfp4"
"""What ``quantization_config.quant_method`` says of such a checkpoint."""
BLOCKS, SCALES = "_blocks", "_scales"
LARGEST, BIAS = 6.0, 127


@dataclass(frozen=True)
class Mxfp4Matrix:
    """One expert's matrix, (in, out), whose codes lie in `blocks`, uint8 (out, groups, 16), and exponents in `scales`, uint8 (out, groups)."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def file(self) -> Any:
        """The file of the codes."""
        return self.blocks.file

    @property
    def dtype(self) -> torch.dtype:
        """What transformers reads it as."""
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """(in, out)."""
        rows, groups = self.scales.shape
        return groups * int(SPEC.group_size or 0), rows

    def read(
        self,
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        digests: TensorDigests | None = None,
    ) -> torch.Tensor:
        """Returns the matrix, as `StoredTensor.read` does."""
        columns, rows = self.shape
        byte = torch.uint8
        codes = self.blocks.read(byte, byte, device, digests).view(packed_codes((rows, columns), SPEC.bits)[0])
        parts = {"codes": codes, "scale": self.scales.read(byte, byte, device, digests)}
        values = codec_of(SPEC).decode(parts, SPEC, (rows, columns))
        return values.to(arithmetic).to(rounding).to(arithmetic).t().contiguous()

    def overflows(self, dtype: torch.dtype) -> bool:
        """Returns whether a value may be beyond the range of `dtype`, by the scales alone."""
        byte = torch.uint8
        greatest = int(self.scales.read(byte, byte, torch.device("cpu")).max())
        return LARGEST * 2.0 ** (greatest - BIAS) > torch.finfo(dtype).max


def published_in_mxfp4(config: Any) -> bool:
    """Returns whether a config of transformers says that its checkpoint holds experts in MXFP4."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return method == METHOD


def mxfp4_tensors(
    model: Any, names: Sequence[str], stored: Mapping[str, StoredTensor]
) -> dict[str, StackedTensor[Mxfp4Matrix]]:
    """Returns those of the parameters `names` whose codes and scales the checkpoint holds, in the shapes that fit.

    Args:
        model: on the meta device.
        names: of parameters that the checkpoint does not hold as they are.
        stored: what it holds, by its own names.
    """
    found: dict[str, StackedTensor[Mxfp4Matrix]] = {}
    for name in names:
        blocks, scales = stored.get(f"{name}{BLOCKS}"), stored.get(f"{name}{SCALES}")
        if blocks is None or scales is None or (*scales.shape, 16) != blocks.shape or len(scales.shape) != 3:
            continue
        rows = range(scales.shape[0])
        tensor = StackedTensor(
            tuple(Mxfp4Matrix(blocks.row(blocks.shape, n), scales.row(scales.shape, n)) for n in rows)
        )
        if tensor.shape == tuple(model.get_parameter(name).shape):
            found[name] = tensor
    return found
