"""K-quants as they lie in a GGUF file: superblocks of 256 values of a row, bytes in llama.cpp's order."""

import numpy as np
import torch

from quantize.codecs.base import Encoded
from quantize.codecs.k_quants.fitting import SUPERBLOCK
from quantize.codecs.packing import unpack
from quantize.spec.quant_spec import QuantSpec

TYPES = {"q4_k": "Q4_K", "q5_k": "Q5_K", "q6_k": "Q6_K"}
"""llama.cpp's names of the formats."""


def k_blocks(stored: Encoded, spec: QuantSpec) -> np.ndarray:
    """Returns the superblocks of a weight, (out, bytes a row) uint8, of what its codec stores."""
    rows, blocks = stored["scale"].shape
    columns = blocks * (spec.group_size or 1)
    codes = unpack(stored["codes"].cpu(), spec.bits, columns).numpy().reshape(-1, 8, 32)
    step = _fp16(stored["step"])
    if spec.format == "q6_k":
        parts = [*_six(codes), stored["scale"].cpu().numpy().view(np.uint8).reshape(len(codes), -1), step]
    else:
        scale, least = (stored[name].cpu().numpy().reshape(len(codes), 8) for name in ("scale", "least"))
        parts = [step, _fp16(stored["least_step"]), _six_bits(scale, least)]
        if spec.format == "q5_k":
            parts.append(_bits(codes))
        low = codes & 15
        parts.append((low[:, 0::2] | low[:, 1::2] << 4).reshape(len(codes), -1))
    result: np.ndarray = np.concatenate(parts, axis=1).reshape(rows, -1)
    return result


def superblock_columns(columns: int) -> bool:
    """Whether rows of so many values are whole superblocks."""
    return columns % SUPERBLOCK == 0


def _fp16(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy().astype("<f2").view(np.uint8).reshape(-1, 2)


def _six_bits(scale: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Returns scales and least values of 8 blocks, 6 bits each, in 12 bytes: the later four give their upper bits to the earlier."""
    upper = [values[:, :4] | values[:, 4:] >> 4 << 6 for values in (scale, least)]
    return np.concatenate([*upper, (scale[:, 4:] & 15) | (least[:, 4:] & 15) << 4], axis=1)


def _bits(codes: np.ndarray) -> np.ndarray:
    """Returns the fifth bits: byte i holds that of value i of each of the 8 blocks."""
    found: np.ndarray = np.zeros((len(codes), 32), np.uint8)
    for block in range(8):
        found |= (codes[:, block] >> 4) << block
    return found


def _six(codes: np.ndarray) -> list[np.ndarray]:
    """Returns the lower four bits, 128 bytes, and the upper two, 64 bytes, of each half's four runs of 32 values."""
    runs = codes.reshape(-1, 2, 4, 32)
    low = (runs[:, :, :2] & 15) | (runs[:, :, 2:] & 15) << 4
    high: np.ndarray = np.zeros((len(codes), 2, 32), np.uint8)
    for run in range(4):
        high |= (runs[:, :, run] >> 4) << 2 * run
    return [low.reshape(len(codes), -1), high.reshape(len(codes), -1)]
