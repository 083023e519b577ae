"""A search along candidates whose cost falls, then rises."""

import math
from collections.abc import Callable, Iterable


def cheapest(
    candidates: Iterable[float], cost: Callable[[float], float], dearer: float = math.inf
) -> tuple[float, list[float]]:
    """Returns the first candidate of least cost, and the costs of those that were tried.

    Args:
        candidates: one or more, in the order in which they are tried.
        cost: of a candidate, 0 or more.
        dearer: where a cost is so many times the least so far, candidates behind it are not tried.

    Raises:
        ValueError: without a candidate.
    """
    tried: list[float] = []
    costs: list[float] = []
    for candidate in candidates:
        tried.append(candidate)
        costs.append(cost(candidate))
        if costs[-1] > dearer * min(costs):
            break
    if not tried:
        raise ValueError("candidates: empty: expected one or more")
    return tried[costs.index(min(costs))], costs
