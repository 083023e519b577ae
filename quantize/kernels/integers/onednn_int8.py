"""oneDNN's int8 Linear on CPUs: the weight is packed once, unsigned activations meet it in VNNI instructions."""

from functools import cache

import torch

from quantize.kernels.base import SHIFT, IntegerRows, IntegerWeight, Multiply, register
from quantize.spec.quant_spec import QuantSpec

OVERFLOW = "without VNNI instructions it adds pairs of products in 16 bits, which overflow with codes of 8 bits"


class OnednnInt8:
    """``torch.ops.onednn.qlinear_pointwise``: symmetric weights with one scale a row, symmetric inputs or one zero point for all."""

    name = "onednn_int8"
    held_bits = 8.0

    def refusal(self, weight: QuantSpec, inputs: QuantSpec, shape: tuple[int, int], device: torch.device) -> str | None:
        """CPUs; no groups, no zero points of the weight, no zero points a token."""
        if (reason := refusal_here(device, weight.bits)) is not None:
            return reason
        if weight.granularity == "group":
            return "it takes one scale a row of the weight, not groups"
        if not weight.symmetric:
            return "it takes no zero points of the weight"
        if not inputs.symmetric and inputs.dynamic:
            return "it takes one zero point for all tokens"
        return None

    def prepare(self, weight: IntegerWeight) -> Multiply:
        """Packs the weight; the codes stay where they are too."""
        packed = torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None)
        out = len(weight.codes)
        scale, zeros = weight.scale[:, 0].contiguous(), torch.zeros(out, dtype=torch.int64)

        def multiply(rows: IntegerRows) -> torch.Tensor:
            if not len(rows.codes):
                return rows.scale.new_zeros(0, out)
            unsigned = (rows.codes.view(torch.uint8) ^ SHIFT).contiguous()
            zero = SHIFT if rows.zero is None else SHIFT + int(rows.zero)
            sums: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
                unsigned, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
            return sums

        return multiply


def refusal_here(device: torch.device, bits: int) -> str | None:
    """Returns in a few words why oneDNN multiplies no weights in int8 with codes of so many bits on `device` of this machine, or None."""
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return OVERFLOW if saturates(bits) else None


@cache
def saturates(bits: int) -> bool:
    """Returns whether the greatest codes of so many bits are multiplied wrongly on this processor.

    Without VNNI instructions two products of an unsigned code of the input, up to 255, are added in 16 bits: those with codes of
    the weight up to 64 fit (7 bits), those with 128 do not.
    """
    least = -(2 ** (bits - 1))
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), least, dtype=torch.int8), None)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    x = torch.full((4, 64), 255, dtype=torch.uint8)
    found = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((found != 64.0 * least * 255).any())


register(OnednnInt8())
