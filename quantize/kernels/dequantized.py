"""The weight dequantized once and held in the model's type: as fast, and as large, as one that was never quantized."""

import torch

from quantize.kernels.floating import Product, StoredWeight, register_floating
from quantize.kernels.matmul import linear
from quantize.spec.quant_spec import QuantSpec


class Dequantized:
    """torch's own product. Has the bits of a weight that is decoded at each call."""

    name = "dequantized"
    rounds = False

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Everything can be dequantized."""
        return None

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """The weight itself."""
        return 8 * dtype.itemsize

    def prepare(self, weight: StoredWeight) -> Product:
        """Decodes the weight."""
        dense = weight.dequantized()

        def multiply(x: torch.Tensor) -> torch.Tensor:
            return linear(x, dense)

        return multiply


register_floating(Dequantized())
