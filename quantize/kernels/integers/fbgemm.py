"""FBGEMM's int8 Linear on CPUs, which torch has for inputs that it rounds itself: given codes it rounds them to themselves.

It takes a tensor's least and greatest value for its range, in 256 steps. Two columns beside the codes that hold -128 and 127, and meet
zeros in the weight, make the step 1, so that what it multiplies is the codes, and its int32 sums are those of the other kernels. (A
row below the codes would do so too, and cost a quarter at 8 rows, of which FBGEMM takes 8 at once.) At some 2 to 8 rows it is the
fastest: a call of it costs less than one of oneDNN (`python -m experiments.bench.one_linear`).
"""

import warnings
from functools import cache, lru_cache

import torch
from torch.nn import functional

from quantize.kernels.base import IntegerRows, IntegerWeight, Multiply, register
from quantize.kernels.integers.onednn_int8 import OVERFLOW
from quantize.spec.quant_spec import QuantSpec

ENGINES = ("x86", "fbgemm")
"""Values of ``torch.backends.quantized.engine`` with which torch's quantized Linear is FBGEMM's."""
LEAST, GREATEST = -128, 127
"""Codes of int8: the range that every call of it is made to see."""


class Fbgemm:
    """``torch.ops.quantized.linear_dynamic``: symmetric weights with one scale a row, symmetric inputs."""

    name = "fbgemm"
    held_bits = 8.0

    def refusal(self, weight: QuantSpec, inputs: QuantSpec, shape: tuple[int, int], device: torch.device) -> str | None:
        """CPUs; no groups, no zero points."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if weight.granularity == "group":
            return "it takes one scale a row of the weight, not groups"
        if not weight.symmetric or not inputs.symmetric:
            return "it takes no zero points"
        if torch.backends.quantized.engine not in ENGINES or not _there():
            return "torch's quantized Linear is not FBGEMM's here"
        return OVERFLOW if _saturates(weight.bits) else None

    def prepare(self, weight: IntegerWeight) -> Multiply:
        """Packs the weight; the codes stay where they are too."""
        # Nothing but zeros may meet the ends of the range.
        packed = _packed(functional.pad(weight.codes, (0, 2)), weight.scale[:, 0])
        out = len(weight.codes)

        def multiply(rows: IntegerRows) -> torch.Tensor:
            count = len(rows)
            if not count:
                return rows.scale.new_zeros(0, out)
            whole = rows.codes.to(torch.float32) if rows.whole is None else rows.whole
            # A NaN would take the range with it; its row's scale spreads it.
            given = torch.cat((whole, _ends(count)), 1).nan_to_num_()
            sums: torch.Tensor = torch.ops.quantized.linear_dynamic(given, packed, False)
            return sums

        return multiply


@lru_cache(maxsize=64)
def _ends(rows: int) -> torch.Tensor:
    """Returns the ends of the range for so many rows, float32 (rows, 2), in one piece: to make them costs as much as to join them."""
    return torch.tensor([[LEAST, GREATEST]], dtype=torch.float32).repeat(rows, 1)


def _packed(codes: torch.Tensor, scale: torch.Tensor) -> torch.ScriptObject:
    """Returns int8 codes (out, in) with a scale a row as FBGEMM reads them."""
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings():
        # That torch means to do without tensors of quantized types; a torch without them has this kernel refused.
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(codes.contiguous(), scale.double(), zeros, 0)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantized, None)
    return packed


def _there() -> bool:
    return hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, "linear_prepack")


@cache
def _saturates(bits: int) -> bool:
    """Returns whether the greatest codes of so many bits are multiplied wrongly on this processor, as `onednn_int8.saturates` does."""
    least = -(2 ** (bits - 1))
    codes = torch.full((16, 64), least, dtype=torch.int8)
    greatest = torch.full((4, 64), GREATEST, dtype=torch.int8)
    found = Fbgemm().prepare(IntegerWeight(codes, torch.ones(16, 1), None))(
        IntegerRows(greatest, torch.ones(4, 1), None)
    )
    return bool((found != 64.0 * least * GREATEST).any())


register(Fbgemm())
