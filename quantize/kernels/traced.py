"""The product of one row, and the rounding of many, as a compiler is given it: a sum that decodes each code where it is read, so that nothing is written in between.

`torch.compile` makes one loop over the weight of it. Kernels cannot be looked into by a compiler, and what it would be given otherwise,
the definition, writes a dequantized weight at each call. Codes of the input meet the weight's codes: sums of up to 2^24 are the integer
kernels' own, greater ones are rounded to float32.
"""

from dataclasses import dataclass

import torch

from quantize.kernels.base import is_absmax
from quantize.spec.quant_spec import QuantSpec

WIDTHS = (2, 4, 8)
"""Bits of codes that do not straddle bytes."""
STRIPS = 2
"""Rows of the weight that are added up at once: each number of the input is read once for all of them."""


@dataclass(frozen=True)
class RowProduct:
    """One row times a stored weight of integers; plain figures only, which a tracer takes as they are.

    Attributes:
        shape: of the weight, (out, in).
        bits: of a code.
        symmetric: whether codes are signed and there are no zero points.
        groups: consecutive columns of a row share a scale, so many times.
        input_bits: of the input's codes, on a grid of the row's greatest magnitude; None where it is not rounded.
    """

    shape: tuple[int, int]
    bits: int
    symmetric: bool
    groups: int
    input_bits: int | None

    @classmethod
    def of(cls, weight: QuantSpec, inputs: QuantSpec | None, shape: tuple[int, int]) -> "RowProduct | None":
        """Returns the product for a weight of this format and `shape` (out, in) and such an input; None for other formats."""
        if not weight.affine or weight.bits not in WIDTHS or weight.granularity not in {"channel", "tensor", "group"}:
            return None
        if inputs is not None and not (inputs.affine and inputs.granularity == "token" and is_absmax(inputs)):
            return None
        size = weight.group_size if weight.granularity == "group" and weight.group_size is not None else shape[1]
        if shape[1] % size or size * weight.bits % 8 or (inputs is not None and not inputs.dynamic):
            return None
        bits = None if inputs is None else inputs.bits
        return cls(shape, weight.bits, weight.symmetric, shape[1] // size, bits)

    def __call__(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns x W^T (..., out), float32.

        Args:
            x: one row, (..., in), floating point.
            codes: packed as `quantize.codecs.integers` does it, like the others.
            scale: of the weight.
            zero_point: of the weight, None for a symmetric one.
        """
        row = x.reshape(1, -1).float()
        if self.input_bits is None:
            return self._dot(row, codes, scale, zero_point).view(*x.shape[:-1], -1)
        rounded, step = traced_rows(row, self.input_bits)
        return (self._dot(rounded, codes, scale, zero_point) * step).view(*x.shape[:-1], -1)

    def _dot(
        self, row: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
    ) -> torch.Tensor:
        out, lanes = self.shape[0], 8 // self.bits
        grouped = _made(row).reshape(self.groups, -1, lanes)
        parts = [_made(grouped[..., lane].contiguous()) for lane in range(lanes)]
        packed = codes.reshape(out, self.groups, -1)
        steps = scale.float().reshape(-1, self.groups).expand(out, self.groups)
        sums = []
        strips = STRIPS if out % STRIPS == 0 else 1
        for start in range(0, out, out // strips):
            rows = slice(start, start + out // strips)
            terms = self._values(packed[rows], 0) * parts[0]
            for lane in range(1, lanes):
                terms = terms + self._values(packed[rows], lane) * parts[lane]
            if self.groups == 1:
                sums.append(terms.sum((1, 2)) * steps[rows, 0])
            else:
                sums.append((terms * steps[rows][..., None]).sum((1, 2)))
        total = torch.stack(sums).reshape(1, out)
        zeros = self._zeros(zero_point, scale.numel(), steps)
        # What zeros are worth is taken off once a group, and not from every code.
        return total if zeros is None else total - (steps * zeros * _made(grouped.sum((1, 2)))).sum(1)

    def _values(self, packed: torch.Tensor, lane: int) -> torch.Tensor:
        """Returns the codes that lie at one place of each byte (rows, groups, bytes), float32; signed ones below 8 bits from 0 up."""
        if self.bits == 8:
            return (packed.view(torch.int8) if self.symmetric else packed).float()
        codes = (packed >> (lane * self.bits)) & (2**self.bits - 1)
        return (codes ^ 2 ** (self.bits - 1) if self.symmetric else codes).float()

    def _zeros(self, zero_point: torch.Tensor | None, count: int, steps: torch.Tensor) -> torch.Tensor | float | None:
        """Returns what `_values` give for the value 0: like `steps` (out, groups), one for all, or None where it is 0."""
        if zero_point is not None:
            # They lie one after another; `unpack` takes eight at a time, by wider numbers.
            lanes = [(zero_point >> (lane * self.bits)) & (2**self.bits - 1) for lane in range(8 // self.bits)]
            zeros = torch.stack(lanes, -1).flatten()[:count].reshape(-1, self.groups)
            return _made(zeros.float()).expand(steps.shape)
        return None if self.bits == 8 else 2.0 ** (self.bits - 1)


def traced_rows(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes (rows, in) and scales (rows, 1) of rows in floating point, both float32: what `integer_rows` gives, whose cached tensor,
    which saves time call by call, would have torch warn where it is traced.
    """
    single = rows.float()
    step = single.abs().amax(1, keepdim=True) / float(2 ** (bits - 1) - 1)
    step = torch.where(step < torch.finfo(torch.float32).tiny, 1.0, step)
    return (single / step).round(), step


def _made(x: torch.Tensor) -> torch.Tensor:
    """Returns `x`, which a compiler then computes once: it would do it anew for every row of the weight where it is read. What is strided
    has to lie in memory.
    """
    return torch.as_strided(x, x.shape, x.stride())
