"""Coordinate descent on tr(D H D^T), D = W - Q: each scale in closed form with the levels fixed, then each level with the
scales fixed (arXiv 2602.02126, its second stage; the same on levels is cyclic descent on GPTQ's own loss).
"""

import torch

from quantize.kernels.matmul import product
from quantize.solvers.levels import Levels


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    steps: torch.Tensor,
    levels: Levels,
    labels: torch.Tensor,
    sweeps: int,
    block: int = 128,
) -> torch.Tensor:
    """Returns levels (in, out) of a loss that is no greater, but for rounding; the scales of `levels` change with them.

    Every single change is the best of its kind, and none raises the loss of its row.

    Args:
        weight: float32 (out, in).
        hessian: float32 (in, in), symmetric, not negative definite anywhere.
        steps: levels to start from, float32 (in, out).
        levels: scales and what can be rounded to; its scales and zero points are changed.
        labels: of the columns, int64 (in,).
        sweeps: passes over all scales, then all levels; ends early when nothing changes.
        block: columns after which changes are carried to all others; changes the time, not the result.
    """
    steps = steps.clone()
    members = [(labels == k).nonzero().squeeze(1) for k in range(len(levels.scale))]
    of = labels.tolist()
    # H D^T, (in, out): what a small change of a weight would do to the loss.
    slope = product(hessian, weight.t() - steps * levels.scale[labels])
    for _ in range(sweeps):
        changed = torch.zeros((), dtype=torch.bool, device=weight.device)
        for label, columns in enumerate(members):
            changed = changed | _rescale(hessian, slope, steps, levels, label, columns)
            changed = changed | _move_zero(hessian, slope, steps, levels, label, columns)
        changed = changed | _relevel(hessian, slope, steps, levels, of, block)
        if not bool(changed):
            break
    return steps


def _rescale(
    hessian: torch.Tensor, slope: torch.Tensor, steps: torch.Tensor, levels: Levels, label: int, columns: torch.Tensor
) -> torch.Tensor:
    """Gives one label the best scales for its levels; updates `slope`. Returns whether any changed."""
    mine, scale = steps[columns], levels.scale[label]
    pull = (mine * slope[columns]).sum(0)
    weight = (mine * product(hessian[columns][:, columns], mine)).sum(0)
    if levels.shared:
        pull, weight = pull.sum().expand_as(scale), weight.sum().expand_as(scale)
    best = torch.where(weight > 0, scale + pull / torch.where(weight > 0, weight, torch.ones_like(weight)), scale)
    # A scale of 0 or less would turn the levels around.
    stored = levels.storable(torch.where(best > 0, best, scale))
    if stored is None:
        return torch.zeros((), dtype=torch.bool, device=steps.device)
    change = stored - scale
    change = torch.where(change * (2 * pull - change * weight) > 0, change, torch.zeros_like(change))
    levels.set_scale(label, torch.where(change != 0, stored, scale))
    slope -= product(hessian[:, columns], mine * change)
    return change.any()


def _move_zero(
    hessian: torch.Tensor, slope: torch.Tensor, steps: torch.Tensor, levels: Levels, label: int, columns: torch.Tensor
) -> torch.Tensor:
    """Moves all weights of one label by a whole step where that is better; updates `slope`. Returns whether any changed."""
    scale = levels.scale[label]
    pull, weight = slope[columns].sum(0) * scale, hessian[columns][:, columns].sum() * scale.square()
    wanted = torch.where(weight > 0, pull / torch.where(weight > 0, weight, torch.ones_like(weight)), pull * 0).round_()
    moved = levels.shift(label, wanted)
    if moved is None:
        return torch.zeros((), dtype=torch.bool, device=steps.device)
    # A shift that met the end of the codes is shorter than the best one, and so is better than none.
    steps[columns] += moved
    slope -= hessian[:, columns].sum(1, keepdim=True) * (moved * scale)
    return moved.any()


def _relevel(
    hessian: torch.Tensor, slope: torch.Tensor, steps: torch.Tensor, levels: Levels, labels: list[int], block: int
) -> torch.Tensor:
    """Gives one column after another the best levels for the rest; updates `slope`. Returns whether any changed."""
    any_change = torch.zeros((), dtype=torch.bool, device=steps.device)
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal)).unbind()
    fresh = torch.empty_like(steps[0])
    for start in range(0, len(steps), block):
        end = min(start + block, len(steps))
        changes = torch.zeros_like(steps[start:end])
        before = changes.t()
        parts = (steps[start:end], slope[start:end], changes, hessian[start:end, start:end])
        for i, (step, pull, change, shares) in enumerate(zip(*(part.unbind() for part in parts), strict=True)):
            label = labels[start + i]
            scale = levels.scale[label]
            now = torch.addmv(pull, before[:, :i], shares[:i], alpha=-1) if i else pull
            wanted = torch.addcmul(now * inverse[start + i], step, scale)
            levels.round(label, wanted, fresh)
            # No level is nearer to the best value than this one, the one so far neither: the loss does not grow.
            torch.mul(fresh - step, scale, out=change)
            step.copy_(fresh)
        slope -= product(hessian[:, start:end], changes)
        any_change = any_change | changes.any()
    return any_change
