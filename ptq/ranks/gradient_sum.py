"""Gradients of a batch whose samples ranks share in parts: their sum has the bits that one rank alone has."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ptq.ranks.reduction import merged, total_of
from ptq.ranks.sample_sum import SampleSum, shares
from ptq.ranks.world import World

PARTS = 4
"""Parts of a batch, at most, each of which one rank takes the gradients of. More would let more ranks take part; each makes products of
fewer rows, and each doubling holds one more set of gradients in memory."""


def part_of(batch_size: int) -> int:
    """Returns the samples of a part: the fewest that divide a batch evenly into `PARTS` or fewer."""
    return next(size for size in range(1, batch_size + 1) if batch_size % size == 0 and batch_size // size <= PARTS)


class Gradients:
    """Gradients by the number of their parameter. A parameter that nothing has reached has none."""

    def __init__(self, of: Mapping[str, torch.Tensor] | None = None):
        self._of = dict(of or {})

    def take(self, parameters: Sequence[torch.Tensor]) -> None:
        """Adds the parameters' gradients, which are theirs no more."""
        found = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
        self.merge(Gradients(found))
        for parameter in parameters:
            parameter.grad = None

    def merge(self, other: "Gradients") -> None:
        """Adds the other's, in place."""
        for key, gradient in other.state().items():
            if key in self._of:
                self._of[key] += gradient
            else:
                self._of[key] = gradient

    def give(self, parameters: Sequence[torch.Tensor]) -> None:
        """Puts them where the parameters have theirs."""
        for i, parameter in enumerate(parameters):
            parameter.grad = self._of.get(str(i))

    def state(self) -> dict[str, torch.Tensor]:
        """Returns them by number."""
        return self._of


def sum_gradients(
    world: World, parameters: Sequence[torch.Tensor], parts: Sequence[int], backward: Callable[[int], object]
) -> None:
    """Gives `parameters`, leaves without gradients, the sum of what `backward` leaves in them for each of the `parts`, on every rank.

    Args:
        world: the ranks; each does some of the parts, and the sums are those of a tree over all of them (`SampleSum`).
        parameters: leaves, in the same order on all ranks.
        parts: numbers of the parts.
        backward: takes the gradients of one part; what it returns is not looked at.
    """
    mine: SampleSum[Gradients] = SampleSum(1, Gradients, merged)
    for place in shares(len(parts), 1, world.size)[world.rank]:
        backward(parts[place])
        mine.of(place).take(parameters)
    total = total_of(world, mine, Gradients, parameters[0].device)
    if total is not None:
        total.give(parameters)
