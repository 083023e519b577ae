"""Sums over samples in an order that depends on the samples alone: not on batches, nor on how many ranks share them."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Node = tuple[int, int, T]
"""(level, index, sum): of the leaves from index 2^level on, below (index + 1) 2^level."""

LEAVES = 16
"""Runs of samples, at most, that are summed one sample after another; their sums are added in a tree of pairs.

More would let more ranks take part, and each doubling holds one sum more in memory: five at most with 16, where one rank sums alone.
"""


def leaf_of(samples: int) -> int:
    """Returns how many samples one leaf has: the least power of two that makes at most `LEAVES` of them."""
    return 1 << max(0, math.ceil(math.log2(samples / LEAVES))) if samples > LEAVES else 1


def sums_held(samples: int) -> int:
    """Returns how many sums a rank that sums so many samples alone holds at most: one a level of the tree, and the one under way."""
    return math.ceil(math.log2(min(LEAVES, max(2, samples)))) + 1


def shares(samples: int, batch_size: int, ranks: int, leaf: int = 1) -> list[range]:
    """Returns the numbers of the batches of each rank, in order; neither a batch nor a leaf is cut.

    Args:
        samples: how many there are.
        batch_size: of them pass together.
        ranks: who share them; those beyond `units` have none.
        leaf: samples that one rank sums.
    """
    unit = math.lcm(batch_size, leaf)
    count, batches = units(samples, batch_size, leaf), -(-samples // batch_size)
    ends = [min(count * rank // ranks * unit // batch_size, batches) for rank in range(ranks + 1)]
    ends[-1] = batches
    return [range(*pair) for pair in itertools.pairwise(ends)]


def units(samples: int, batch_size: int, leaf: int = 1) -> int:
    """Returns how many ranks can have a share of the samples."""
    return -(-samples // math.lcm(batch_size, leaf))


def by_sample(x: torch.Tensor, rows: slice) -> list[tuple[int, slice]]:
    """Returns the numbers of the samples in a batch's tensor, and which rows of ``x.reshape(-1, channels)`` are theirs.

    Args:
        x: (samples, ..., channels); of another shape, such as an expert's (tokens, channels), all is the first sample's.
        rows: numbers of the batch's samples.
    """
    count = x.shape[:-1].numel()
    if x.dim() < 3 or x.shape[0] != rows.stop - rows.start:
        return [(rows.start, slice(0, count))]
    length = count // x.shape[0]
    return [(rows.start + i, slice(i * length, (i + 1) * length)) for i in range(x.shape[0])]


class SampleSum(Generic[T]):
    """Adds up what each sample gives. The order of additions is that of a tree over the samples' numbers.

    Samples of one leaf are added one after another into one accumulator. Leaf 2k and leaf 2k + 1 are then merged, such pairs
    again, and so on; where a leaf has nothing, its neighbour is taken as it is. Ranks that have whole leaves send what they
    have merged, and whoever merges the rest ends with the bits that one rank alone has.

    Args:
        leaf: samples of a leaf.
        empty: makes an accumulator of nothing.
        merge: adds the second accumulator to the first and returns it; may overwrite the first.
        clear: makes what was merged into another an accumulator of nothing again, in its own memory; None where `empty` costs nothing.
    """

    def __init__(
        self,
        leaf: int,
        empty: Callable[[], T],
        merge: Callable[[T, T], T],
        clear: Callable[[T], object] | None = None,
    ):
        self._leaf, self._empty, self._merge, self._clear = leaf, empty, merge, clear
        self._open: tuple[int, T] | None = None
        self._done: list[tuple[int, int, T]] = []
        # What has been merged: new memory of some MiB costs more than the sums that are written there.
        self._spare: list[T] = []

    def like(self) -> "SampleSum[T]":
        """Returns a sum of the same kind, of nothing yet."""
        return SampleSum(self._leaf, self._empty, self._merge, self._clear)

    def of(self, sample: int) -> T:
        """Returns the accumulator that the sample of this number is added to; samples come in ascending order.

        Raises:
            ValueError: for a sample of a leaf that is closed.
        """
        leaf = sample // self._leaf
        if self._open is not None and self._open[0] == leaf:
            return self._open[1]
        self._close()
        if self._done and leaf < (self._done[-1][1] + 1) << self._done[-1][0]:
            raise ValueError(f"sample {sample} comes after those of later leaves")
        self._open = leaf, self._cleared()
        return self._open[1]

    def nodes(self) -> list[Node[T]]:
        """Returns what has been merged so far."""
        self._let_go()
        return list(self._done)

    def add(self, nodes: Iterable[Node[T]]) -> None:
        """Adds the nodes of another rank, whose leaves come after these."""
        self._let_go()
        for node in nodes:
            self._append(node)

    def total(self) -> T | None:
        """Returns the sum of all; None where no sample gave anything. Nothing can be added to it afterwards."""
        self._let_go()
        level = 0
        while len(self._done) > 1:
            before, self._done = self._done, []
            for found, index, value in before:
                # Who has no neighbour goes up alone.
                self._append((level + 1, index // 2, value) if found == level else (found, index, value))
            level += 1
        return self._done[0][2] if self._done else None

    def _close(self) -> None:
        if self._open is not None:
            (leaf, value), self._open = self._open, None
            self._append((0, leaf, value))

    def _let_go(self) -> None:
        """Closes the leaf; who has seen all samples needs no memory for more."""
        self._close()
        self._clear = None
        self._spare.clear()

    def _cleared(self) -> T:
        if self._clear is None or not self._spare:
            return self._empty()
        value = self._spare.pop()
        self._clear(value)
        return value

    def _append(self, node: Node[T]) -> None:
        while self._done and node[1] % 2 and self._done[-1][:2] == (node[0], node[1] - 1):
            merged = self._merge(self._done.pop()[2], node[2])
            if self._clear is not None:
                self._spare.append(node[2])
            node = node[0] + 1, node[1] // 2, merged
        self._done.append(node)
