"""What rounding a Linear's input and weights costs at its output, as a smooth function of the map that acts on the input.

Rounding to a grid of step s leaves errors of variance s^2 / 12, as good as independent of one another once a map has mixed the
channels. Of the input they meet the mapped weight: the mean over tokens of s^2 / 12 times |W'|^2. Of the weight they meet the
input's second moments H'. A solver that lets later columns make up for earlier ones (GPTQ) leaves s^2 / 12 times the pivots of
H', whose geometric mean is det(H')^(1/n): that is what counts here, n times, since a mixing map makes them alike. Both terms stay as
they are when the map is multiplied by a number. WUSH (arXiv 2512.00956) minimises the first for steps that follow a token's norm.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch

from quantize.grid.affine import grouped
from quantize.kernels.matmul import row_squares
from quantize.spec.quant_spec import QuantSpec

WEIGHT_VALUES = 1 << 18
"""Numbers of the weights that the cost looks at, about."""
FLOAT_STEP = 1 / 6
"""Step of E2M1 beside a block's greatest magnitude, about."""


@dataclass(frozen=True)
class RoundingCost:
    """The cost of rounding, relative to the energy of the outputs.

    Attributes:
        rows: some tokens of the input, float32 (tokens, in).
        weight: evenly spaced rows of all weights that read it, float32 (some, in).
        share: rows of the weights for each of these.
        input: format of the input; None leaves it alone.
        weights: format of the weights; None leaves them alone.
        log_volume: log det(H) / in, of the second moments of the input with some damping.
        energy: mean over tokens of the outputs' squares, summed.
    """

    rows: torch.Tensor
    weight: torch.Tensor
    share: float
    input: QuantSpec | None
    weights: QuantSpec | None
    log_volume: float
    energy: float

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        hessian: torch.Tensor,
        weight: torch.Tensor,
        input: QuantSpec | None,
        weights: QuantSpec | None,
        damping: float = 0.01,
    ) -> Self:
        """Returns the cost for an input with second moments `hessian` = X^T X / tokens, (in, in), and all `weight` (out, in).

        `damping`, a share of the mean of its diagonal, is added to it as a solver would.

        Raises:
            ValueError: for a Hessian that is zero or holds NaN or inf.
        """
        wide = hessian.double()
        mean = float(wide.diagonal().mean())
        if not 0 < mean < math.inf:
            raise ValueError("hessian: zero, or holds NaN or inf: expected second moments of tokens")
        damped = wide + damping * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        log_volume = float(torch.linalg.slogdet(damped).logabsdet) / len(wide)
        energy = float(row_squares(weight.float(), hessian.float()).double().sum())
        some = weight[:: max(1, weight.numel() // WEIGHT_VALUES)].float()
        energy = max(energy, torch.finfo(torch.float32).tiny)
        return cls(rows.float(), some, len(weight) / len(some), input, weights, log_volume, energy)

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor, log_determinant: torch.Tensor) -> torch.Tensor:
        """Returns the cost behind a map, a scalar; differentiable.

        Args:
            rows: the mapped tokens (tokens, in).
            weight: the mapped `weight` (some, in).
            log_determinant: log |det| of the map.
        """
        total = rows.new_zeros(())
        width = rows.shape[-1]
        if self.input is not None:
            squares = _groups(weight, self.input).square().sum(-1).sum(0)
            steps = _steps(_groups(rows, self.input), self.input).square()
            steps = steps.mean(0) if self.input.dynamic else steps.amax(0)
            total = total + (steps * squares).sum() / 12
        if self.weights is not None:
            steps = _steps(_groups(weight, self.weights), self.weights).square()
            volume = torch.exp(self.log_volume + 2 * log_determinant / width)
            total = total + steps.mean(-1).sum() * width * volume / 12
        return total * (self.share / self.energy)


def _groups(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns `x` (rows, n) as (rows, groups, size): the channels that share a scale in a row."""
    return grouped(x, spec) if spec.granularity == "group" else x.unsqueeze(1)


def _steps(groups: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns the step (rows, groups) of the grid that spans each group."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if not spec.affine:
        return torch.maximum(high, -low) * FLOAT_STEP
    if spec.symmetric:
        return torch.maximum(high, -low) / (2 ** (spec.bits - 1) - 1)
    return (high - low) / (2**spec.bits - 1)
