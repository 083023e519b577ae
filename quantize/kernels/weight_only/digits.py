"""An activation in floating point as digits of 8 bits, each an integer product with the same int8 weight, on CPUs.

A row is rounded to steps of 2^-30 of its greatest magnitude (2^-22 in 16-bit types) and written in base 256 with digits from
-128 to 127: x = step (d0 + 256 d1 + 65536 d2 + ...). Sums of digits times codes are exact in int32, so that what is lost is
less than float32's own rounding loses (splitting of operands: Ozaki, Ogita, Oishi and Rump 2012). Few rows take the time that
it takes to read the codes, for one digit as for four.
"""

import torch

from quantize.kernels.base import SHIFT
from quantize.kernels.floating import Product, StoredWeight, register_floating
from quantize.kernels.integers.onednn_int8 import refusal_here
from quantize.spec.quant_spec import QuantSpec

BASE = 256
DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}
"""Digits of a value, by the model's type."""
_TINY = torch.finfo(torch.float32).tiny


class Digits:
    """``torch.ops.onednn.qlinear_pointwise`` on the digits of the activation: no activation is rounded to 8 bits."""

    name = "digits"
    rounds = False

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Symmetric integers with one scale a row, on CPUs with VNNI."""
        if not weight.affine or not weight.symmetric or weight.granularity not in {"channel", "tensor"}:
            return "it takes symmetric integers with one scale a row"
        if dtype not in DIGITS:
            return f"it multiplies no {dtype}".replace("torch.", "")
        return refusal_here(device, weight.bits)

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Another copy of the codes, one a byte."""
        return 8

    def prepare(self, weight: StoredWeight) -> Product:
        """Packs the weight."""
        codes, scale = weight.codes().contiguous(), weight.scales()[:, 0].contiguous()
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        out, count = len(codes), DIGITS[weight.dtype]
        ones, zeros = torch.ones(out), torch.zeros(out, dtype=torch.int64)
        places = torch.tensor([[float(BASE**k) for k in range(count)]])

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if not len(x):
                return x.new_zeros(0, out)
            digits, step = split(x, count)
            sums = torch.ops.onednn.qlinear_pointwise(
                digits.flatten(0, 1), 1.0, SHIFT, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
            y: torch.Tensor = (places @ sums.view(count, -1)).view(len(x), out)
            return y.mul_(step).mul_(scale).to(x.dtype)

        return multiply


def split(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the digits of `x` (rows, in), lowest first and `SHIFT` above what they are, uint8 (count, rows, in), and the steps
    that they count, float32 (rows, 1). NaN and inf in a row are in its step.
    """
    rows = x.detach().float()
    step = rows.abs().amax(1, keepdim=True).mul_(2.0 ** -(8 * count - 2)).clamp_(min=_TINY)
    shifts = sum(SHIFT * BASE**k for k in range(count))
    # Beyond int32 the sum wraps around, and its bytes are the digits all the same.
    whole = (rows / step).round_().to(torch.int32) + (shifts - 2**32 if count == 4 else shifts)
    parts = whole.view(torch.uint8).view(*x.shape, 4)[..., :count]
    return parts.permute(2, 0, 1).contiguous(), step


register_floating(Digits())
