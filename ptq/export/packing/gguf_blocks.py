"""Weights in GGUF's block formats: 32 values of a row, an fp16 step, for Q4_1 an fp16 least value (METHODS.md section 1)."""

import numpy as np
import torch

from ptq.export.packing.k_blocks import TYPES, k_blocks
from ptq.export.quantized_tensors import LinearTensors
from quantize.spec.quant_spec import QuantSpec

BLOCK = 32


def type_of(spec: QuantSpec) -> str:
    """Returns the block format that holds the codes of `spec`: Q4_0 up to 4 bits, Q4_1 with zero points, else Q8_0; or a K-quant."""
    if spec.format in TYPES:
        return TYPES[spec.format]
    if not spec.symmetric:
        return "Q4_1"
    return "Q4_0" if spec.bits <= 4 else "Q8_0"


def blocks_of(tensors: LinearTensors) -> tuple[np.ndarray, float]:
    """Returns the blocks (out, bytes a row) uint8, and how far rounding to fp16 moved a weight at most.

    A scale that more than 32 values share is repeated in each of their blocks. The second is 0 where the scheme's scales
    are fp16 already (`QuantSpec.scales`).
    """
    spec, codes = tensors.spec, tensors.codes
    if spec is not None and spec.format in TYPES and tensors.stored is not None:
        return k_blocks(tensors.stored, spec), 0.0
    if spec is None or codes is None:
        raise ValueError(f"{tensors.name} has no codes")
    rows, columns = codes.shape
    scale = _by_block(tensors.row_scales(), rows, columns)
    zero = tensors.row_zero_points()
    step = scale.half()
    parts = [step.cpu().numpy().astype("<f2").view(np.uint8).reshape(rows, -1, 2)]
    moved = (step.float() - scale).abs().max() * 2 ** (spec.bits - spec.symmetric)
    if zero is not None:
        exact = -_by_block(zero, rows, columns) * scale
        least = exact.half()
        moved = moved + (least.float() - exact).abs().max()
        parts.append(least.cpu().numpy().astype("<f2").view(np.uint8).reshape(rows, -1, 2))
    values = codes.reshape(rows, -1, BLOCK)
    if type_of(spec) == "Q8_0":
        parts.append(values.cpu().numpy().view(np.uint8))
    else:
        # Q4_0 counts its codes from -8. The first 16 values of a block are the low halves of its bytes.
        nibbles = (values + 8 if spec.symmetric else values).to(torch.uint8).cpu().numpy()
        parts.append(nibbles[..., :16] | nibbles[..., 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(rows, -1), float(moved)


def _by_block(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns per-row values (out or 1, groups) as (out, blocks a row)."""
    wide = values.expand(rows, -1)
    return wide.repeat_interleave(columns // BLOCK // wide.shape[1], dim=1)
