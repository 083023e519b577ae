"""torch's product of an activation in floating point with int8 codes that have one scale a row, on CPUs."""

import torch

from quantize.kernels.floating import Product, StoredWeight, register_floating
from quantize.spec.quant_spec import QuantSpec


class Int8Pack:
    """``torch._weight_int8pack_mm``: codes are converted as they are read, so that a few rows cost what reading int8 does."""

    name = "int8pack"
    rounds = False

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Symmetric integers with one scale a row."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if not weight.affine or not weight.symmetric or weight.granularity not in {"channel", "tensor"}:
            return "it takes symmetric integers with one scale a row"
        if dtype not in {torch.float32, torch.bfloat16, torch.float16}:
            return f"it multiplies no {dtype}".replace("torch.", "")
        return None

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Codes below 8 bits are held one a byte."""
        return 0 if weight.bits == 8 else 8

    def prepare(self, weight: StoredWeight) -> Product:
        """Unpacks the codes where they are packed."""
        codes, scale = weight.codes().contiguous(), weight.scales()[:, 0].to(weight.dtype).contiguous()

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if not len(x):
                return x.new_zeros(0, len(codes))
            return torch._weight_int8pack_mm(x.contiguous(), codes, scale)

        return multiply


register_floating(Int8Pack())
