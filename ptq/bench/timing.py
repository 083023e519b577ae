"""Times of sides that take turns, so that what else the machine does falls on all of them; medians with spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


def clock_of(device: torch.device) -> Callable[[], float]:
    """Returns a clock in seconds that first waits for what `device` was told to do."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@dataclass(frozen=True)
class Figure:
    """What was measured of one side in one task.

    Attributes:
        task: such as ``prefill 512``.
        side: its name.
        seconds: of each round.
        median: of the seconds.
        ratio: median over rounds of the first side's seconds over its own, above 1 where it is faster.
        least: the least of these ratios.
        most: the greatest.
        tokens: of the task, for tokens a second.
    """

    task: str
    side: str
    seconds: tuple[float, ...]
    median: float
    ratio: float
    least: float
    most: float
    tokens: int

    @property
    def tokens_a_second(self) -> float:
        """Tokens over the median of the seconds."""
        return self.tokens / self.median


def in_turn(
    task: str,
    sides: Mapping[str, Callable[[], object]],
    tokens: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Figure]:
    """Returns a figure a side: all take a turn in each round, after one that does not count; ratios are over the first side."""
    for work in sides.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            start = clock()
            work()
            seconds[name].append(clock() - start)
    first = next(iter(seconds.values()))
    figures = []
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(first, mine, strict=True)]
        figures.append(
            Figure(
                task,
                name,
                tuple(mine),
                statistics.median(mine),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                tokens,
            )
        )
    return figures
