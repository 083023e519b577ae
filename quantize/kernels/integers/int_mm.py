"""torch's own product of int8 matrices, on CPUs and CUDA: int32 sums, so every format of integers has its place."""

import torch

from quantize.kernels.base import IntegerRows, IntegerWeight, Multiply, register
from quantize.spec.quant_spec import QuantSpec

CUDA_STEP = 8
"""What cuBLASLt wants the columns and rows of an int8 weight to be a multiple of."""
CUDA_ROWS = 32
"""Rows that a product on CUDA is filled up to: it takes no fewer than 17."""


class IntMm:
    """``torch._int_mm``."""

    name = "int_mm"
    held_bits = 0.0

    def refusal(self, weight: QuantSpec, inputs: QuantSpec, shape: tuple[int, int], device: torch.device) -> str | None:
        """Any integers on CPUs; on CUDA widths that are multiples of 8."""
        if device.type not in {"cpu", "cuda"}:
            return f"it runs on CPUs and CUDA, not on {device.type}"
        inner = weight.group_size or shape[1]
        if device.type == "cuda" and (shape[0] % CUDA_STEP or inner % CUDA_STEP):
            return f"on CUDA rows and columns (here {shape[0]} and {inner}) must be multiples of {CUDA_STEP}"
        return None

    def prepare(self, weight: IntegerWeight) -> Multiply:
        """Keeps nothing but sums of columns beside the codes themselves."""
        if weight.groups == 1 and weight.zero is None:
            return _plain(weight)
        sums = weight.sums()
        # (in, out) as views: a group's columns are rows of the transposed codes.
        parts = [part.t() for part in weight.codes.chunk(weight.groups, dim=1)]

        def multiply(rows: IntegerRows) -> torch.Tensor:
            total: torch.Tensor | None = None
            for g, (part, codes) in enumerate(zip(parts, rows.codes.chunk(len(parts), dim=1), strict=True)):
                sum_ = _product(codes, part)
                if weight.zero is not None:
                    sum_.addcmul_(codes.sum(1, keepdim=True, dtype=torch.int32), weight.zero[:, g][None], value=-1)
                if rows.zero is not None:
                    sum_.addcmul_(rows.zero, sums[:, g][None], value=-1)
                scaled = sum_ * weight.scale[:, g]
                total = scaled if total is None else total.add_(scaled)
            return rows.scale.new_zeros(len(rows.codes), 0) if total is None else total

        return multiply


def _plain(weight: IntegerWeight) -> Multiply:
    """Returns the product with a symmetric weight that has one scale a row, in as few operations as there are."""
    codes, scale = weight.codes.t(), weight.scale[:, 0]
    totals = weight.sums()[:, 0]

    def multiply(rows: IntegerRows) -> torch.Tensor:
        total = _product(rows.codes, codes)
        if rows.zero is not None:
            total.addcmul_(rows.zero, totals[None], value=-1)
        return total * scale

    return multiply


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the int32 product of int8 (rows, inner) and (inner, columns)."""
    count = a.shape[0]
    if not count:
        return a.new_zeros(0, b.shape[1], dtype=torch.int32)
    if a.is_cuda and count < CUDA_ROWS:
        return torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, CUDA_ROWS - count)), b)[:count]
    return torch._int_mm(a.contiguous(), b)


register(IntMm())
