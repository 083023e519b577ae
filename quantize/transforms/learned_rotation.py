"""Rotations learned on tokens: steps on the orthogonal matrices that make what is rounded flatter.

Two losses. ``range``: the mean square of the grid's step, which is the error that rounding leaves at the output of whatever reads the
turned tokens, since a rotation leaves the sum of squares of its weights alone. ``whip``: DartQuant's sum of exp(-|x|) over tokens of
unit variance, which drives values away from 0, out towards a uniform distribution. Two kinds of steps: ``cayley`` (SpinQuant,
Liu et al. 2024) and ``qr`` (DartQuant).
"""

import math
from collections.abc import Callable

import torch

from quantize.grid.affine import grouped
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.orthogonal import cayley_step, qr_step

STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {"cayley": cayley_step, "qr": qr_step}
LOSSES = ("range", "whip")
MOMENTUM = 0.9


def rotation_loss(turned: torch.Tensor, loss: str, spec: QuantSpec | None = None) -> torch.Tensor:
    """Returns the loss of turned tokens (tokens, width), a scalar; differentiable.

    Args:
        turned: rows of unit mean square, weighed by what their errors count.
        loss: one of `LOSSES`.
        spec: whose groups and zero points ``range`` has; None: a symmetric range for each token.

    Raises:
        ValueError: for an unknown loss.
    """
    if loss == "whip":
        return torch.exp(-turned.abs()).sum(-1).mean()
    if loss != "range":
        raise ValueError(f"loss: {loss!r} is not valid: expected one of {', '.join(LOSSES)}")
    groups = grouped(turned, spec) if spec is not None and spec.granularity == "group" else turned.unsqueeze(1)
    low, high = groups.amin(-1), groups.amax(-1)
    extent = (high - low) / 2 if spec is not None and not spec.symmetric else torch.maximum(high, -low)
    return extent.square().mean()


def learned_rotation(
    rows: torch.Tensor,
    start: torch.Tensor,
    loss: str = "range",
    kind: str = "cayley",
    steps: int = 50,
    rate: float = 1.0,
    spec: QuantSpec | None = None,
    held_out: int = 4,
) -> tuple[torch.Tensor, float, float]:
    """Returns the rotation (width, width) of least loss on held-out tokens on the way, and that loss before and after.

    Gradients are averaged over steps (momentum `MOMENTUM`); the rate is of a gradient scaled to unit spectral norm, about, and falls
    to 0 by a cosine, so that it means the same for every width and loss: an angle in radians.

    Args:
        rows: tokens (tokens, width), float32; every `held_out`-th is held out.
        start: orthogonal (width, width).
        loss: one of `LOSSES`.
        kind: of the steps: one of `STEPS`.
        steps: 0 returns the start.
        rate: largest angle of the first step.
        spec: as in `rotation_loss`.
        held_out: 2 or more.

    Raises:
        ValueError: for an unknown loss or kind, fewer than two tokens, or steps below 0.
    """
    if kind not in STEPS:
        raise ValueError(f"kind: {kind!r} is not valid: expected one of {', '.join(STEPS)}")
    if steps < 0 or len(rows) < held_out:
        raise ValueError(f"steps: {steps} with {len(rows)} tokens: expected 0 or more, and {held_out} tokens or more")
    out = torch.arange(len(rows), device=rows.device) % held_out == held_out - 1
    shown, kept = rows[~out].float(), rows[out].float()
    matrix = start.detach().float()
    first = least = float(rotation_loss(kept @ matrix, loss, spec))
    best, momentum = start.detach(), torch.zeros_like(matrix)
    for step in range(steps):
        variable = matrix.clone().requires_grad_()
        with torch.enable_grad():
            value = rotation_loss(shown @ variable, loss, spec)
            (gradient,) = torch.autograd.grad(value, variable)
        # What counts of a gradient is its skew part: the rest leaves the orthogonal matrices.
        skew = gradient @ matrix.t()
        skew = (skew - skew.t()) / 2
        momentum = MOMENTUM * momentum + skew
        size = torch.linalg.matrix_norm(momentum, ord=2)
        if not bool(size > 0):
            break
        angle = rate * (1 + math.cos(math.pi * step / steps)) / 2
        matrix = STEPS[kind](matrix, momentum @ matrix, angle / float(size))
        now = float(rotation_loss(kept @ matrix, loss, spec))
        if now < least:
            best, least = matrix.clone(), now
    return _orthogonal(best.double()), first, least


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the nearest orthogonal matrix in float64: two steps of Newton and Schulz take float32's rounding away."""
    for _ in range(3):
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.t() @ matrix)
    return matrix
