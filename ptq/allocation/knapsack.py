"""Which of its choices each group takes, so that the losses' sum is least and what they take stays within a budget."""

import math
from collections.abc import Sequence

import torch

MOST_UNITS = 1 << 18
"""Steps that a budget is divided into at most: beyond it sizes are rounded up to whole steps."""


def allocate(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Solves the multiple-choice knapsack problem by dynamic programming over the budget.

    Exact where the sizes above each group's smallest have a common divisor of which the budget holds `MOST_UNITS` at most; else
    sizes count as up to budget / `MOST_UNITS` more than they are, and the budget still holds.

    Args:
        sizes: by group what each of its choices takes, whole numbers.
        losses: by group what each costs, finite.
        budget: what all may take together.

    Returns:
        The number of each group's choice. Of equal sums of losses the one that takes less comes first.

    Raises:
        ValueError: for groups without choices, sizes and losses that do not fit one another, losses that are not finite, or a
            budget below the least that the groups take.
    """
    if len(sizes) != len(losses) or any(len(a) != len(b) or not len(a) for a, b in zip(sizes, losses, strict=False)):
        raise ValueError("sizes and losses: expected as many of each in every group, at least one")
    if not all(math.isfinite(loss) for group in losses for loss in group):
        raise ValueError("losses: NaN or inf")
    least = [min(group) for group in sizes]
    spare = budget - sum(least)
    if spare < 0:
        raise ValueError(f"budget: {budget} is below {sum(least)}, the least that the groups take")
    extras = [[size - low for size in group] for group, low in zip(sizes, least, strict=True)]
    unit = math.gcd(*(extra for group in extras for extra in group)) or 1
    spare = min(spare, sum(max(group) for group in extras))
    unit = max(unit, -(-spare // MOST_UNITS))
    units = [[-(-extra // unit) for extra in group] for group in extras]
    return _chosen(units, losses, spare // unit)


def _chosen(units: list[list[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Returns the choices; `units` of a group begin at 0 somewhere, and `capacity` units are there."""
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    """The least loss of the groups so far with at most as many units as the index."""
    taken: list[torch.Tensor] = []
    orders: list[list[int]] = []
    for group, costs in zip(units, losses, strict=True):
        # Of equal losses the first is kept: that of the least size.
        order = sorted(range(len(group)), key=lambda i: (group[i], costs[i]))
        now = torch.full_like(best, math.inf)
        choice = torch.zeros(capacity + 1, dtype=torch.int16)
        for place, i in enumerate(order):
            if group[i] > capacity:
                break
            after = torch.full_like(best, math.inf)
            after[group[i] :] = best[: capacity + 1 - group[i]] + costs[i]
            better = after < now
            now[better], choice[better] = after[better], place
        best = now
        taken.append(choice)
        orders.append(order)
    # The fewest units that reach the least loss.
    at = int(torch.nonzero(best == best[-1])[0])
    found: list[int] = []
    for group, choice, order in zip(reversed(units), reversed(taken), reversed(orders), strict=True):
        i = order[int(choice[at])]
        found.append(i)
        at -= group[i]
    return found[::-1]
