"""Scales of K-quants: a block's step and least value by weighed least squares, then rounded to what a superblock stores."""

from dataclasses import dataclass

import torch

from quantize.codecs.base import Encoded

SUPERBLOCK = 256
"""Values of a row that share the fp16 steps of their blocks' scales."""
SHRINKS = tuple(round(1.1 - 0.025 * i, 3) for i in range(17))
"""Multipliers of a block's range that the search tries, each followed by a fit of the line to the codes that it gives."""
TINY = torch.finfo(torch.float32).tiny
ROWS = 128
"""Rows that are fitted together: bounds the temporaries."""


@dataclass(frozen=True)
class Form:
    """How a K-quant makes values: ``step * scale * (code - middle) - least_step * least``.

    Attributes:
        bits: of a code.
        block: values that share a scale.
        scale_limit: greatest code of a scale: 63 (unsigned) with least values, 127 (signed) without.
        least: whether blocks have least values.
    """

    bits: int
    block: int
    scale_limit: int
    least: bool

    @property
    def middle(self) -> int:
        """The code that stands for 0, before the least value."""
        return 0 if self.least else 2 ** (self.bits - 1)

    @property
    def greatest(self) -> int:
        """The greatest code."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class Scales:
    """What is stored of a weight's scales.

    Attributes:
        scale: uint8, or int8 without least values, (out, blocks).
        step: fp16 (out, superblocks).
        least: uint8 (out, blocks), or None.
        least_step: fp16 (out, superblocks), or None.
        held: blocks in a superblock.
    """

    scale: torch.Tensor
    step: torch.Tensor
    least: torch.Tensor | None
    least_step: torch.Tensor | None
    held: int

    def steps(self) -> torch.Tensor:
        """Returns the step between values, float32 (out, blocks)."""
        return self._spread(self.step) * self.scale.float()

    def leasts(self) -> torch.Tensor:
        """Returns what is taken from every value, float32 (out, blocks)."""
        if self.least is None or self.least_step is None:
            return torch.zeros_like(self.scale, dtype=torch.float32)
        return self._spread(self.least_step) * self.least.float()

    def _spread(self, units: torch.Tensor) -> torch.Tensor:
        """Returns fp16 units (out, superblocks) as float32 (out, blocks)."""
        return units.float().repeat_interleave(self.held, 1)[:, : self.scale.shape[1]]

    def stored(self) -> Encoded:
        """Returns the tensors by name."""
        parts = {"scale": self.scale, "step": self.step}
        if self.least is not None and self.least_step is not None:
            parts |= {"least": self.least, "least_step": self.least_step}
        return parts


def scales_of(parts: Encoded, form: Form) -> Scales:
    """Returns the scales among what is stored of a weight."""
    held = SUPERBLOCK // form.block
    return Scales(parts["scale"], parts["step"], parts.get("least"), parts.get("least_step"), held)


def fitted(weight: torch.Tensor, form: Form, weighing: torch.Tensor | None = None) -> Scales:
    """Returns the scales of a weight (out, in) with a small weighed squared error of rounding to nearest.

    Args:
        weight: floating point, its columns a multiple of the block.
        form: the format.
        weighing: what a squared error in each column weighs, 0 or more, (in,), such as a Hessian's diagonal; None weighs all alike.
    """
    columns = torch.ones(weight.shape[1], device=weight.device) if weighing is None else weighing.float()
    # Relative, and never 0: a line through weightless points is no line.
    columns = columns / columns.amax().clamp_min(TINY) + 1e-6
    importance = columns.unflatten(0, (-1, form.block))
    parts = [_fit(rows.float().unflatten(1, (-1, form.block)), importance, form) for rows in weight.split(ROWS)]
    scale, step, least, least_step = (
        torch.cat([t for t in part if t is not None]) if part[0] is not None else None
        for part in zip(*parts, strict=True)
    )
    if scale is None or step is None:
        raise ValueError("the weight has no rows")
    return Scales(scale, step, least, least_step, SUPERBLOCK // form.block)


def _fit(
    x: torch.Tensor, importance: torch.Tensor, form: Form
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns what `Scales` holds of blocks (rows, blocks, size)."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if form.least:
        step, least = (high - low) / form.greatest, -low
    else:
        # Signed: whichever end is greater falls on the least code, which reaches one further.
        step = torch.where(high > -low, -high, -low) / form.middle
        least = torch.zeros_like(step)
    best = torch.full_like(step, torch.inf)
    chosen = step, least
    for shrink in SHRINKS:
        tried = step * shrink, least * shrink
        for _ in range(2):
            codes = codes_of(x, *tried, form)
            error = (
                ((codes - form.middle) * tried[0][..., None] - tried[1][..., None] - x).square().mul(importance).sum(-1)
            )
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, tried[0], chosen[0]), torch.where(better, tried[1], chosen[1])
            tried = _line(x, codes - form.middle, importance, form)
    return _rounded(*chosen, form)


def _line(
    x: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor, form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns step and least value, 0 or more, that give the blocks by their levels with the least weighed squared error."""
    squares = (levels.square() * importance).sum(-1)
    through = (levels * x * importance).sum(-1) / squares.clamp_min(TINY)
    if not form.least:
        return through, torch.zeros_like(through)
    total = importance.sum(-1)
    mean, value = (levels * importance).sum(-1) / total, (x * importance).sum(-1) / total
    spread = squares / total - mean.square()
    step = ((levels * x * importance).sum(-1) / total - mean * value) / spread.clamp_min(TINY)
    least = step * mean - value
    # A least value above 0 is none: then the line goes through 0.
    fits = (least >= 0) & (step > 0)
    return torch.where(fits, step, through.clamp_min(0)), torch.where(fits, least, torch.zeros_like(least))


def codes_of(x: torch.Tensor, step: torch.Tensor, least: torch.Tensor, form: Form) -> torch.Tensor:
    """Returns the nearest codes, whole numbers in float32, of blocks (..., size) with steps and least values (...)."""
    inverse = torch.where(step.abs() < TINY, torch.zeros_like(step), 1 / step)
    return ((x + least[..., None]) * inverse[..., None] + form.middle).round_().clamp_(0, form.greatest)


def _rounded(
    step: torch.Tensor, least: torch.Tensor, form: Form
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    # A block that is its least value throughout needs a step nevertheless, so that a solver's levels reach it.
    step = torch.where((step == 0) & (least > 0), least / form.greatest, step)
    scale, unit = _coded(step, form)
    if not form.least:
        return scale.to(torch.int8), unit, None, None
    low, least_unit = _coded(least, form)
    scale = torch.where(step > 0, scale.clamp_min(1), scale)
    return scale.to(torch.uint8), unit, low.to(torch.uint8), least_unit


def _coded(values: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whole numbers for values (rows, blocks), and the fp16 units (rows, superblocks) that they count."""
    blocks, held = values.shape[1], SUPERBLOCK // form.block
    # A last superblock may be shorter: only a file's rows have to be whole ones.
    grouped = torch.nn.functional.pad(values, (0, -blocks % held)).unflatten(1, (-1, held))
    most = torch.finfo(torch.float16).max
    unit = (grouped.abs().amax(-1) / form.scale_limit).clamp(max=most).half()
    divisor = torch.where(unit > 0, unit.float(), torch.full_like(unit, torch.inf, dtype=torch.float32))
    limit = form.scale_limit
    return (grouped / divisor[..., None]).round_().clamp_(0 if form.least else -limit, limit).flatten(1)[
        :, :blocks
    ], unit
