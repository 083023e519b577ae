"""Integer affine quantization: one definition for simulation and storage (METHODS.md section 1, absmax and zero point)."""

from dataclasses import dataclass

import torch

from quantize.spec.quant_spec import QuantSpec


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

    def of_channels(self, labels: torch.Tensor) -> "Grid":
        """Returns the grid (..., channels) of a grid (..., clusters): channel j has the scale of cluster ``labels[j]``."""
        zero_point = None if self.zero_point is None else self.zero_point[..., labels]
        return Grid(self.scale[..., labels], zero_point, self.low, self.high)

    def to(self, device: torch.device | str) -> "Grid":
        """Returns the grid on `device`."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return Grid(self.scale.to(device), zero_point, self.low, self.high)

    def split(self, rows: list[int]) -> "list[Grid]":
        """Returns the grids of the weights that, `rows` each, make up the tall weight whose rows this grid has."""
        zero_points = [None] * len(rows) if self.zero_point is None else self.zero_point.split(rows)
        return [Grid(s, z, self.low, self.high) for s, z in zip(self.scale.split(rows), zero_points, strict=True)]


def integer_range(bits: int, symmetric: bool, full_range: bool = False) -> tuple[int, int]:
    """Returns the least and greatest code: ±(2^(bits-1) - 1) when symmetric, 0 .. 2^bits - 1 otherwise.

    With `full_range` a symmetric range has the code -2^(bits-1) too.
    """
    high = 2 ** (bits - 1) - 1
    return (-high - full_range, high) if symmetric else (0, 2**bits - 1)


def grid_from_range(
    minimum: torch.Tensor, maximum: torch.Tensor, bits: int, symmetric: bool, full_range: bool = False
) -> Grid:
    """Returns the grid that spans `minimum` .. `maximum`, widened to contain 0.

    Every value between the ends moves by half a step at most when it is quantized, symmetric or not. A rounded zero point
    puts the outermost codes up to half a step inside or outside the ends, no further: ``clamp`` takes nothing from a value
    but what rounding it would. In float32 the bound is ``scale * (1/2 + (high - low) / 2**22)``.

    With `full_range` a symmetric grid spreads its 2^bits codes over ±absmax: the step is 2 absmax / (2^bits - 1), and
    +absmax itself saturates half a step below.

    Computed in float32, so fp16 limits do not overflow; a range that is empty or too small for a float32 scale gets
    scale 1, which sends its values (0, or far below any other) to 0. Range ends up to float32's own limits are finite.
    NaN or inf in the range gives NaN or inf in the scale: it spreads to the result instead of being hidden.
    """
    low, high = integer_range(bits, symmetric, full_range)
    steps = (high - low) / 2 if symmetric else high
    minimum = minimum.float().clamp(max=0)
    maximum = maximum.float().clamp(min=0)
    # Divided before subtracting: max - min of huge values would overflow.
    scale = torch.maximum(-minimum, maximum) / steps if symmetric else maximum / steps - minimum / steps
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    if symmetric:
        # A step that was rounded up would carry the greatest code of float32's own limit to inf: one ulp or two less.
        ceiling = torch.finfo(torch.float32).max / -low * (1 - 2**-23)
        scale = torch.where(torch.isinf(scale), scale, scale.clamp(max=ceiling))
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
    return _saturated(values.mul_(grid.scale), grid, dtype)


def fake_quantize(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns ``dequantize(quantize(x))`` in the type of `x`, without making the integer codes."""
    values = x.float() / grid.scale
    values = values.round_()
    if grid.zero_point is None:
        values = values.clamp_(grid.low, grid.high)
    else:
        values = values.add_(grid.zero_point).clamp_(grid.low, grid.high).sub_(grid.zero_point)
    return _saturated(values.mul_(grid.scale), grid, x.dtype)


def fake_quantize_absmax(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns `x` rounded to symmetric grids fitted to each row of its last dimension: bit for bit what
    ``fake_quantize(x, grid_from_range(-absmax, absmax, bits, True))`` gives, in fewer passes over memory.
    """
    # amin and amax: along a dimension, aminmax and vector_norm(inf) were measured 8 to 10 times slower on CPU.
    grid = grid_from_range(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits, True)
    # No clamp: |x| / scale exceeds the greatest code by a few ulp at most, which rounding takes away.
    return _saturated((x / grid.scale).round_().mul_(grid.scale), grid, x.dtype)


def _saturated(values: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """Returns `values` in `dtype`, its end points kept from rounding to inf; `values` is overwritten.

    A rounded zero point can push the last step beyond the type's greatest number, and a grid fitted in float32 may lie
    outside a 16-bit type. A symmetric float32 grid cannot overflow (see `grid_from_range`), and is spared the pass.
    """
    if dtype == torch.float32 and grid.zero_point is None:
        return values
    limit = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp_(-limit, limit).to(dtype)


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
        nearest = [d for d in divisors if d < spec.group_size][-1:] + [d for d in divisors if d > spec.group_size][:1]
        close = " or ".join(str(d) for d in nearest)
        raise ValueError(f"group_size: {spec.group_size} does not divide the last dimension {size}: use {close}")
    return x.unflatten(-1, (size // spec.group_size, spec.group_size))
