"""torch's product of a bfloat16 activation with 4-bit codes in groups, on CPUs."""

import torch

from quantize.kernels.floating import Product, StoredWeight, group_of, register_floating
from quantize.spec.quant_spec import QuantSpec

GROUPS = (256, 128, 64, 32)
"""Group sizes that it takes."""
ROWS = 16
"""What it wants the rows of the weight to be a multiple of."""
MIDDLE = 8
"""The code that stands for 0."""


class Int4Pack:
    """``torch._weight_int4pack_mm_for_cpu``. Its scales are bfloat16, an error no greater than that of a weight in bfloat16."""

    name = "int4pack"
    rounds = False

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Symmetric integers up to 4 bits in groups of 32 to 256 or with one scale a row; models in bfloat16."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if not weight.affine or not weight.symmetric or weight.bits > 4:
            return "it takes symmetric integers up to 4 bits"
        if weight.granularity not in {"channel", "tensor", "group"} or group_of(weight, shape[1], GROUPS) is None:
            return f"it takes groups of {', '.join(map(str, sorted(GROUPS)))}"
        if shape[0] % ROWS:
            return f"it takes weights whose rows (here {shape[0]}) are a multiple of {ROWS}"
        if dtype != torch.bfloat16:
            return "it computes in bfloat16"
        return None

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Its own packed codes, and two 16-bit numbers a group."""
        return 4 + 32 / (weight.group_size or min(GROUPS))

    def prepare(self, weight: StoredWeight) -> Product:
        """Packs the codes its own way."""
        group = group_of(weight.spec, weight.shape[1], GROUPS) or min(GROUPS)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes().to(torch.int32) + MIDDLE, 1)
        scale = weight.scales().repeat_interleave(weight.shape[1] // group // weight.scales().shape[1], 1)
        pairs = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).to(torch.bfloat16).contiguous()

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if not len(x):
                return x.new_zeros(0, len(scale))
            result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)
            return result

        return multiply


register_floating(Int4Pack())
