"""Integer affine quantization: one definition for simulation and storage (METHODS.md section 1, absmax and zero point)."""

from dataclasses import dataclass

import torch

from quantize.spec import QuantSpec


@dataclass(frozen=True)
class Grid:
    """The points that codes stand for: ``(code - zero_point) * scale``.

    Attributes:
        scale: float32, broadcastable to the tensor in its `grouped` shape.
        zero_point: float32 whole numbers of the same shape, or None for a symmetric grid.
        low: least code.
        high: greatest code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    low: int
    high: int


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Returns the least and greatest code: ±(2^(bits-1) - 1) when symmetric, 0 .. 2^bits - 1 otherwise."""
    high = 2 ** (bits - 1) - 1
    return (-high, high) if symmetric else (0, 2**bits - 1)


def grid_from_range(minimum: torch.Tensor, maximum: torch.Tensor, bits: int, symmetric: bool) -> Grid:
    """Returns the grid that spans `minimum` .. `maximum`, widened to contain 0.

    Computed in float32, so fp16 limits do not overflow; a range that is empty or too small for a float32 scale gets
    scale 1, which sends its values (0, or far below any other) to 0. Range ends up to float32's own limits are finite.
    """
    low, high = integer_range(bits, symmetric)
    minimum = minimum.float().clamp(max=0)
    maximum = maximum.float().clamp(min=0)
    # Divided before subtracting: max - min of huge values would overflow.
    scale = torch.maximum(-minimum, maximum) / high if symmetric else maximum / high - minimum / high
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    zero_point = None if symmetric else (-minimum / scale).round_().clamp_(low, high)
    return Grid(scale, zero_point, low, high)


def quantize(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns codes of `x`: int8 for a symmetric grid, uint8 otherwise; round half to even, saturating."""
    codes = (x.float() / grid.scale).round_()
    if grid.zero_point is not None:
        codes = codes.add_(grid.zero_point)
    return codes.clamp_(grid.low, grid.high).to(torch.int8 if grid.low < 0 else torch.uint8)


def dequantize(codes: torch.Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the values that `codes` stand for, in `dtype`, clamped to its finite range."""
    values = codes.float()
    if grid.zero_point is not None:
        values = values.sub_(grid.zero_point)
    values = values.mul_(grid.scale)
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype)


def fake_quantize(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns ``dequantize(quantize(x))`` in the type of `x`, without making the integer codes."""
    values = x.float() / grid.scale
    values = values.round_()
    if grid.zero_point is None:
        values = values.clamp_(grid.low, grid.high)
    else:
        values = values.add_(grid.zero_point).clamp_(grid.low, grid.high).sub_(grid.zero_point)
    # A rounded zero point can push the last step beyond the type's greatest number.
    limit = torch.finfo(x.dtype).max
    return values.mul_(grid.scale).clamp_(-limit, limit).to(x.dtype)


def grouped(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns a view of `x` in which the values that share a scale are the last dimension(s) to reduce.

    ``group``: (..., groups, group_size). Everything else: `x` as it is.

    Raises:
        ValueError: when `group_size` does not divide the last dimension; a shorter last group is refused, since no
            runtime that reads grouped weights expresses one.
    """
    if spec.granularity != "group" or spec.group_size is None:
        return x
    size = x.shape[-1]
    if size % spec.group_size:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        close = min(divisors, key=lambda d: abs(d - (spec.group_size or 0)))
        raise ValueError(f"group_size: {spec.group_size} does not divide the last dimension {size}: use {close}")
    return x.unflatten(-1, (size // spec.group_size, spec.group_size))
