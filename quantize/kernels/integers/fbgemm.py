"""FBGEMM's int8 Linear on CPUs, which torch has for inputs that it rounds itself: given codes it rounds them to themselves.

It is told the step of the input's grid. With a step of 1 what it multiplies is the codes, and its int32 sums are those of the other
kernels. It takes them in float32, before their conversion. At some 2 to 128 rows it is the fastest: a call of it costs less than one of
oneDNN (`python -m experiments.bench.one_linear`).
"""

import warnings
from functools import cache

import torch

from quantize.kernels.base import SHIFT, IntegerRows, IntegerWeight, Multiply, register
from quantize.kernels.integers.onednn_int8 import OVERFLOW
from quantize.spec.quant_spec import QuantSpec

ENGINES = ("x86", "fbgemm")
"""Values of ``torch.backends.quantized.engine`` with which torch's quantized Linear is FBGEMM's."""
LINEAR = "linear_with_input_q_dq_qweight_dq_output_fp32"
"""Torch's Linear of (input, its step, its zero point, packed weight)."""


class Fbgemm:
    """Torch's Linear of an input whose step is given: symmetric weights with one scale a row, symmetric inputs."""

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
        packed = _packed(weight.codes, weight.scale[:, 0])
        out, linear = len(weight.codes), getattr(torch.ops.quantized, LINEAR)

        def multiply(rows: IntegerRows) -> torch.Tensor:
            if not len(rows):
                return rows.scale.new_zeros(0, out)
            # A NaN becomes some code of its row, whose scale spreads it.
            whole = rows.codes.to(torch.float32) if rows.whole is None else rows.whole
            sums: torch.Tensor = linear(whole, 1.0, SHIFT, packed)
            return sums

        return multiply


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
    operations = torch.ops.quantized
    packs = hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(operations, "linear_prepack")
    return packs and hasattr(operations, LINEAR)


@cache
def _saturates(bits: int) -> bool:
    """Returns whether the greatest codes of so many bits are multiplied wrongly on this processor, as `onednn_int8.saturates` does."""
    least = -(2 ** (bits - 1))
    codes = torch.full((16, 64), least, dtype=torch.int8)
    greatest = torch.full((4, 64), SHIFT - 1, dtype=torch.int8)
    found = Fbgemm().prepare(IntegerWeight(codes, torch.ones(16, 1), None))(
        IntegerRows(greatest, torch.ones(4, 1), None)
    )
    return bool((found != 64.0 * least * (SHIFT - 1)).any())


register(Fbgemm())
