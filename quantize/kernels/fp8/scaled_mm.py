"""torch's product of FP8 matrices with a scale a row on either side, on CPUs and on CUDA from compute capability 8.9 on."""

from functools import cache

import torch

from quantize.codecs.fp8 import FP8_E4M3
from quantize.kernels.floating import Product, StoredWeight, register_floating
from quantize.spec.quant_spec import QuantSpec

CAPABILITY = (8, 9)
"""The first CUDA devices with products of FP8 (Ada, Hopper)."""
CUDA_STEP = 16
"""What cuBLASLt wants the columns and rows of the weight to be a multiple of."""


class ScaledMm:
    """``torch._scaled_mm``: E4M3 weights with one scale a row or one for all, inputs in E4M3 with a range for each token."""

    name = "scaled_mm"
    rounds = True

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """FP8 in weight and input; on CUDA models in bfloat16 and widths that are multiples of 16."""
        if weight.format != "fp8_e4m3" or weight.granularity not in {"channel", "tensor"}:
            return "it takes fp8_e4m3 with one scale a row or one for all"
        if inputs is None or inputs.format != "fp8_e4m3" or inputs.granularity != "token":
            return "it rounds inputs to fp8_e4m3 with a range for each token, and in no other way"
        if device.type == "cpu":
            if dtype not in {torch.float32, torch.bfloat16}:
                return f"it multiplies no {dtype}".replace("torch.", "")
            return None if _rows_on_cpus() else "on CPUs this torch takes one scale for all rows only"
        if device.type != "cuda":
            return f"it runs on CPUs and CUDA, not on {device.type}"
        if dtype != torch.bfloat16:
            return "on CUDA it gives bfloat16"
        if shape[0] % CUDA_STEP or shape[1] % CUDA_STEP:
            return f"on CUDA rows and columns (here {shape[0]} and {shape[1]}) must be multiples of {CUDA_STEP}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < CAPABILITY:
            return f"this device has no products of FP8: they begin with compute capability {'.'.join(map(str, CAPABILITY))}"
        return None

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Nothing: it reads the codes as they are stored."""
        return 0

    def prepare(self, weight: StoredWeight) -> Product:
        """Keeps views of the codes and of their scales."""
        rows, inputs = weight.shape[0], weight.inputs
        if inputs is None:
            raise ValueError("inputs: it multiplies rounded inputs only")
        codes = weight.stored["codes"].t()
        scale = weight.stored["scale"].reshape(1, -1).expand(1, rows).contiguous()

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if not len(x):
                return x.new_zeros(0, rows)
            parts = FP8_E4M3.quantize(x.contiguous(), inputs)
            result: torch.Tensor = torch._scaled_mm(
                parts["codes"], codes, scale_a=parts["scale"], scale_b=scale, out_dtype=x.dtype
            )
            return result

        return multiply


@cache
def _rows_on_cpus() -> bool:
    """Returns whether a scale a row is taken on this processor: torch 2.11 has an assertion against it where oneDNN multiplies FP8."""
    codes, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


register_floating(ScaledMm())
