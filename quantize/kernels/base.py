"""What an integer kernel multiplies, and what it says of itself."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from quantize.grid.affine import Grid, quantize
from quantize.grid.ranges import dynamic_grid
from quantize.spec.quant_spec import QuantSpec

SIMULATED = "simulated"
"""The product of dequantized weight and rounded input in floating point: the reference that every kernel is held to."""
SHIFT = 128
"""Codes of an asymmetric grid of 8 bits, 0 .. 255, less this are int8."""


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integer kernels take it: ``(codes - zero) * scale``.

    Attributes:
        codes: int8 (out, in).
        scale: float32 (out, groups): one a row, or one for each group of consecutive columns.
        zero: int32 (out, groups), or None where all are 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    @property
    def groups(self) -> int:
        """Groups of columns that have a scale of their own."""
        return self.scale.shape[1]

    def sums(self) -> torch.Tensor:
        """Returns the sum of codes less zero points of each row and group, int32 (out, groups): what a step of the input's
        zero point is worth."""
        grouped = self.codes.unflatten(1, (self.groups, -1))
        total = grouped.sum(2, dtype=torch.int32)
        return total if self.zero is None else total - self.zero * grouped.shape[2]


class IntegerRows:
    """An activation as integer kernels take it: ``(codes - zero) * scale``.

    Attributes:
        scale: float32 (rows, 1), or (1, 1) for all rows; NaN for a row that holds NaN, so that it spreads to the result.
        zero: int32 of the same shape, or None where all are 0.
        whole: the codes before their conversion, float32 (rows, in), NaN where the row's scale is; None where they came as int8.
    """

    __slots__ = ("__weakref__", "_codes", "scale", "whole", "zero")

    def __init__(
        self,
        codes: torch.Tensor | None,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        whole: torch.Tensor | None = None,
    ):
        self._codes, self.scale, self.zero, self.whole = codes, scale, zero, whole

    @property
    def codes(self) -> torch.Tensor:
        """The codes, int8 (rows, in); converted when they are first asked for: not every kernel wants them."""
        if self._codes is None:
            if self.whole is None:
                raise ValueError("codes: neither int8 nor float32 were given")
            self._codes = self.whole.to(torch.int8)
        return self._codes

    def __len__(self) -> int:
        """The number of rows."""
        held = self._codes if self.whole is None else self.whole
        return 0 if held is None else held.shape[0]


Multiply = Callable[[IntegerRows], torch.Tensor]
"""Gives sum (x - zero) (w - zero) * weight scale, float32 (rows, out): the exact sum of each group, rounded once, times the
group's scale; groups are added from left to right. The input's scale and the bias are not in it."""


class Kernel(Protocol):
    """Who multiplies integers.

    Attributes:
        name: what it is asked for by.
        held_bits: bits a weight that it holds beside the codes, one a byte.
    """

    name: str
    held_bits: float

    def refusal(self, weight: QuantSpec, inputs: QuantSpec, shape: tuple[int, int], device: torch.device) -> str | None:
        """Returns in a few words why it cannot multiply by a weight of this format and `shape` (out, in), or None."""

    def prepare(self, weight: IntegerWeight) -> Multiply:
        """Returns the product with this weight, whose packed form is kept with it."""


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Adds a kernel; called where it is written."""
    _KERNELS[kernel.name] = kernel


def registered() -> dict[str, Kernel]:
    """Returns the registered kernels by name."""
    return dict(_KERNELS)


def format_refusal(weight: QuantSpec | None, inputs: QuantSpec | None) -> str | None:
    """Returns in a few words why a product of these formats is no sum of integers, or None when it is one."""
    if weight is None:
        return "the weight is in floating point"
    if inputs is None:
        return "the input is in floating point"
    for name, spec in (("weight", weight), ("input", inputs)):
        if not spec.affine:
            return f"the {name}'s format, {spec.format}, is not made of integers"
    if weight.granularity not in {"tensor", "channel", "group"}:
        return f"the weight has a scale a {weight.granularity}"
    wanted = "token" if inputs.dynamic else "tensor"
    if inputs.granularity != wanted:
        return f"the input's {'dynamic' if inputs.dynamic else 'static'} scales are one a {inputs.granularity}, not one a {wanted}"
    return None


def integer_weight(codes: torch.Tensor, grid: Grid) -> IntegerWeight:
    """Returns codes (out, in), int8 or uint8, and their grid, (1,), (out, 1) or (out, groups, 1), as kernels take them."""
    rows = len(codes)
    scale = grid.scale.reshape(1, 1) if grid.scale.numel() == 1 else grid.scale.reshape(rows, -1)
    scale = scale.expand(rows, -1).contiguous()
    if grid.zero_point is None:
        return IntegerWeight(codes, scale, None)
    zero = grid.zero_point.reshape(1, 1) if grid.zero_point.numel() == 1 else grid.zero_point.reshape(rows, -1)
    return IntegerWeight(_shifted(codes), scale, zero.expand(rows, -1).to(torch.int32) - SHIFT)


def integer_rows(x: torch.Tensor, spec: QuantSpec, grid: Grid | None) -> IntegerRows:
    """Returns an activation (..., in) as kernels take it, its codes those that the simulation stands for.

    Args:
        x: floating point (..., in).
        spec: its format, one that `format_refusal` lets through.
        grid: the static grid; None where ranges are dynamic.
    """
    rows = x.reshape(-1, x.shape[-1])
    if grid is None and is_absmax(spec):
        return _absmax_rows(rows, spec.bits)
    found = dynamic_grid(rows, spec) if grid is None else grid
    codes, scale = quantize(rows, found), found.scale.reshape(-1, 1)
    if grid is not None and len(rows):
        # An integer cannot be NaN: its row's scale is, as a dynamic one would be.
        greatest = rows.amax(1, keepdim=True).float()
        scale = torch.where(greatest.isnan(), greatest, scale)
    if found.zero_point is None:
        return IntegerRows(codes, scale, None)
    zero = found.zero_point.reshape(-1, 1).nan_to_num().to(torch.int32) - SHIFT
    return IntegerRows(_shifted(codes), scale, zero)


def is_absmax(spec: QuantSpec) -> bool:
    """Returns whether a dynamic grid of integers is that of the greatest magnitude, as it is."""
    return spec.symmetric and not spec.full_range and spec.clip == 1 and spec.range == "minmax"


def _absmax_rows(rows: torch.Tensor, bits: int) -> IntegerRows:
    """Returns rows on symmetric grids of their own: what `dynamic_grid` and `quantize` give, in as few operations as there are.

    At one row each of them costs as much as some ten thousand products. Where a row's greatest magnitude is float32's own
    limit, its scale may be one unit in the last place above that of `grid_from_range`.
    """
    rows = rows.detach() if rows.requires_grad else rows
    magnitudes, single = rows.abs(), rows.dtype is torch.float32
    scale = magnitudes.amax(1, keepdim=True)
    # Even a conversion that does nothing costs what the shortest operations do.
    scale = (scale if single else scale.float()).div_(_greatest(bits))
    # Scales below the least normal number become 1; NaN stays.
    torch.threshold_(scale, _BELOW_TINY, 1.0)
    # Magnitudes have been read: the quotients take their place, where the type is the same.
    quotients = torch.div(rows, scale, out=magnitudes) if single else rows / scale
    return IntegerRows(None, scale, None, quotients.round_())


@cache
def _greatest(bits: int) -> torch.Tensor:
    """Returns the greatest code as a tensor: a Python number would be converted at each call."""
    return torch.tensor(float(2 ** (bits - 1) - 1))


_BELOW_TINY = torch.finfo(torch.float32).tiny * (1 - 2**-23)


def _shifted(codes: torch.Tensor) -> torch.Tensor:
    """Returns uint8 codes less `SHIFT`, int8."""
    return (codes ^ SHIFT).view(torch.int8)


def finish(
    sums: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Returns a `Multiply`'s result times the input's scale, plus the bias (out,), in `dtype`; `sums` may be overwritten.

    All kernels end here: those with equal sums have equal bits. `scale`: `IntegerRows.scale`, None where it is in `sums`.
    """
    scaled = sums if scale is None else sums.mul_(scale)
    summed = scaled if bias is None else scaled.add_(bias)
    return summed if summed.dtype is dtype else summed.to(dtype)
