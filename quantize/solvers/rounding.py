"""Quantized weights that can be trained: learned rounding (AutoRound, Cheng et al. 2023) and learned clipping (OmniQuant, Shao
et al. 2023). Parameters give the weight with straight-through gradients, and in the end codes and a grid.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quantize.codecs.base import checked
from quantize.grid.affine import Grid, grid_from_range, grouped, integer_range
from quantize.grid.ranges import weight_grid
from quantize.grid.scales import rounded_scales
from quantize.spec.quant_spec import QuantSpec

LEAST = 0.05
"""Least share of a range that is left to it: with none a weight would have no steps."""
WARM_SHARE = 8
"""One step in so many is spent on raising the rate to its greatest, where it is warmed up."""
OPEN = 4.0
"""Where OmniQuant's clipping starts: sigmoid(4) = 0.982 of the range."""


class LearnedWeight(nn.Module):
    """A weight on a grid whose ranges are learned: shares `low` and `high` of the plain range, one a scale.

    Calling it gives the fake-quantized weight (out, in), float32, differentiable in the parameters: rounding passes gradients
    as if it were not there, saturation stops them. `final` gives what is stored, whose values are the same bits.

    Args:
        weight: (out, in), any floating type; not trained.
        spec: an integer format.
        labels: cluster of each column, with granularity cluster.
        start: grid whose ranges count as the plain ones, shaped as `weight_grid`'s; None takes minmax.

    Raises:
        ValueError: for a format that is no integer grid, NaN or inf in the weight, or as `weight_grid`.
    """

    values: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor
    labels: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None = None, start: Grid | None = None
    ):
        super().__init__()
        if not spec.affine:
            raise ValueError(f"format: {spec.format!r} has no range to learn: use int")
        self.spec, self.shape = spec, weight.shape
        plain = weight_grid(checked(weight).float(), spec, labels) if start is None else start
        self.low_code, self.high_code = integer_range(spec.bits, spec.symmetric)
        zero = torch.zeros_like(plain.scale) if plain.zero_point is None else plain.zero_point
        # Its own: a step that learns scales too writes them into the module's weight before it asks for `final`.
        self.register_buffer("values", grouped(weight.detach().to(torch.float32, copy=True), spec))
        self.register_buffer("minimum", (self.low_code - zero) * plain.scale)
        self.register_buffer("maximum", (self.high_code - zero) * plain.scale)
        self.register_buffer("labels", labels if spec.granularity == "cluster" else None)

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the least and greatest value of each range, differentiable."""
        raise TypeError(f"{type(self).__name__} does not say what it learns of a range")

    def scaled(self) -> torch.Tensor:
        """Returns the weight that is rounded, in its grouped shape."""
        return self.values

    def offset(self) -> torch.Tensor | None:
        """Returns what is added before rounding, in steps, in the grouped shape of the weight."""
        return None

    def grid(self) -> Grid:
        """Returns the grid, its scale and zero point differentiable."""
        low, high = self.ranges()
        exact = grid_from_range(low, high, self.spec.bits, self.spec.symmetric)
        stored = rounded_scales(Grid(exact.scale.detach(), None, exact.low, exact.high), low.detach(), self.spec.scales)
        scale = valued(exact.scale, stored.scale)
        if exact.zero_point is None:
            return Grid(scale, None, exact.low, exact.high)
        wanted = -low.clamp(max=0) / scale
        return Grid(scale, valued(wanted, wanted.detach().round().clamp_(exact.low, exact.high)), exact.low, exact.high)

    def forward(self) -> torch.Tensor:
        """Returns the weight (out, in) that the parameters stand for."""
        codes, grid = self._codes()
        steps = codes if grid.zero_point is None else codes - grid.zero_point
        return (steps * grid.scale).reshape(self.shape)

    @torch.no_grad()
    def final(self) -> tuple[torch.Tensor, Grid]:
        """Returns the codes (out, in), int8 or uint8, and the grid in the shape of `weight_grid`."""
        codes, _ = self._codes()
        kind = torch.int8 if self.low_code < 0 else torch.uint8
        return codes.reshape(self.shape).to(kind), self.grid()

    def project(self) -> None:
        """Puts parameters that a step has carried out of their bounds back; called after every step."""

    def _codes(self) -> tuple[torch.Tensor, Grid]:
        grid = self.grid()
        grid = grid if self.labels is None else grid.of_channels(self.labels)
        exact, offset = self.scaled() / grid.scale, self.offset()
        exact = exact if offset is None else exact + offset
        codes = valued(exact, exact.detach().round())
        codes = codes if grid.zero_point is None else codes + grid.zero_point
        return codes.clamp(grid.low, grid.high), grid


class LearnedRounding(LearnedWeight):
    """AutoRound: a rounding offset V in [-0.5, 0.5] a weight, and shares of the range in [`LEAST`, 1] a scale (equations 2 and 3).

    Trained by `sign_step`; starts as rounding to nearest on the plain range.
    """

    def __init__(
        self, weight: torch.Tensor, spec: QuantSpec, labels: torch.Tensor | None = None, start: Grid | None = None
    ):
        super().__init__(weight, spec, labels, start)
        self.rounding = nn.Parameter(torch.zeros_like(self.values))
        self.low_share = nn.Parameter(torch.ones_like(self.minimum))
        self.high_share = nn.Parameter(torch.ones_like(self.maximum))

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends times their shares."""
        return self.minimum * self.low_share, self.maximum * self.high_share

    def offset(self) -> torch.Tensor:
        """V."""
        return self.rounding

    @torch.no_grad()
    def project(self) -> None:
        """Clamps V and the shares to their bounds."""
        self.rounding.clamp_(-0.5, 0.5)
        self.low_share.clamp_(LEAST, 1)
        self.high_share.clamp_(LEAST, 1)


class LearnedClipping(LearnedWeight):
    """OmniQuant's learnable weight clipping: the ends of the range times sigmoids of parameters (equation 2).

    With `log_scale` the columns are multiplied by exp of it before (its learnable equivalent transformation, equation 3,
    without the shift), and the ranges are those of the scaled weight.

    Args:
        weight: as in `LearnedWeight`; so are `spec`, `labels` and `start`.
        log_scale: logarithm of what the columns are multiplied by, (in,), or None. Not with granularity cluster.

    Raises:
        ValueError: as `LearnedWeight`, or for a scale where there are clusters or a start.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        spec: QuantSpec,
        labels: torch.Tensor | None = None,
        start: Grid | None = None,
        log_scale: nn.Parameter | None = None,
    ):
        super().__init__(weight, spec, labels, start)
        if log_scale is not None and start is not None:
            raise ValueError("log_scale, start: the ranges are those of the scaled weight: give one of the two")
        if log_scale is not None and spec.granularity == "cluster":
            raise ValueError("log_scale: with granularity 'cluster' ranges of scaled columns are not known: use None")
        self.log_scale = log_scale
        self.low_logit = nn.Parameter(torch.full_like(self.minimum, OPEN))
        self.high_logit = nn.Parameter(torch.full_like(self.maximum, OPEN))

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends times sigmoids, held to `LEAST`."""
        low, high = (torch.sigmoid(x).clamp(min=LEAST) for x in (self.low_logit, self.high_logit))
        if self.log_scale is None:
            return self.minimum * low, self.maximum * high
        values = self.scaled().flatten() if self.spec.granularity == "tensor" else self.scaled()
        ends = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        if self.spec.symmetric:
            most = torch.maximum(-ends[0], ends[1])
            ends = -most, most
        return ends[0] * low, ends[1] * high

    def scaled(self) -> torch.Tensor:
        """The weight times exp of the scale, grouped."""
        if self.log_scale is None:
            return self.values
        return grouped(self.values.reshape(self.shape) * torch.exp(self.log_scale), self.spec)


@torch.no_grad()
def sign_step(parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Moves each parameter by `rate` against the sign of its gradient, and forgets the gradient: one step of sign-SGD."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.sub_(parameter.grad.sign(), alpha=rate)
            parameter.grad = None


def linear_decay(step: int, steps: int, rate: float | None = None) -> float:
    """Returns the rate of step `step` (from 0) of `steps`: `rate`, by default 1 / steps, falling linearly to 0 after the last.

    With the default, V can just cross its whole range of 1 / 2 in the course of training.
    """
    return (1 / steps if rate is None else rate) * (1 - step / steps)


def warmed_cosine(step: int, steps: int, rate: float) -> float:
    """Returns the rate of step `step` (from 0) of `steps`: it rises to `rate` over the first steps, and falls to 0 by half a cosine."""
    return rate * min(1.0, WARM_SHARE * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None


def valued(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns `value`, with the gradient of `x`: the straight-through estimator, without the rounding error of x + (value - x)."""
    result: torch.Tensor = _Valued.apply(x, value)
    return result
