"""Linears that read the same codes, multiplied as one: which they are is found by what is read, not by names."""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from quantize.kernels.base import IntegerRows, IntegerWeight
from quantize.kernels.choice import Multiplier
from quantize.kernels.opaque import integer_sums
from quantize.kernels.traced import traced_rows


class Reader(Protocol):
    """A Linear whose weight may be stacked on others'.

    Attributes:
        out_features: rows of its weight.
        place: where it stands among Linears that are multiplied as one; kept by `Fused`.
        apart: whether it is not to be multiplied with others any more; kept by `Fused`.
    """

    out_features: int
    place: "Place | None"
    apart: bool

    def stacking(self) -> tuple[object, ...]:
        """Returns what has to be equal in Linears that are multiplied as one."""

    def stacked(self, others: Sequence[Any]) -> tuple[Multiplier, IntegerWeight] | None:
        """Returns what multiplies by its weight with those of `others` below it, and that weight, or None where nothing can."""

    def rest_on(self, weight: IntegerWeight) -> None:
        """Takes its codes, the same as before, out of `weight` from now on, and lets its own go."""


class _Group:
    """Linears as one, in the order in which they were seen to read; they are held weakly, as they hold the group."""

    def __init__(self, readers: Sequence[Reader], multiplier: Multiplier):
        self.readers = [weakref.ref(reader) for reader in readers]
        self.sizes = [reader.out_features for reader in readers]
        self.total = sum(self.sizes)
        self.multiplier = multiplier
        # What was multiplied last, and what has not been fetched of it. One object: threads see both or neither.
        self.last: tuple[IntegerRows, dict[int, torch.Tensor]] | None = None
        # The same while a compiler traces; None before and after, so that nothing of a graph stays.
        self.traced: tuple[torch.Tensor, torch.Tensor] | None = None

    def fetch(self, index: int, rows: IntegerRows, lead: Sequence[int]) -> torch.Tensor | None:
        """Returns the part of the reader at `index`, (*lead, out); None where it is not called as it was seen to be."""
        last = self.last
        if last is not None and last[0] is rows:
            return last[1].pop(index, None)
        if index or (last is not None and last[1]):
            return None
        whole = self.multiplier.run(rows, len(rows)).mul_(rows.scale)
        own, *others = whole.view(*lead, self.total).split_with_sizes(self.sizes, -1)
        self.last = (rows, dict(enumerate(others, 1)))
        return own

    def trace(self, index: int, x: torch.Tensor, bits: int) -> torch.Tensor | None:
        """Returns the part of the reader at `index` of an activation x (..., in) that a compiler traces, float32 (rows, out); None where
        the readers are not called as they were seen to be."""
        if index == 0:
            self.traced = x, traced_sums(self.multiplier, x, bits, self.total)
        whole = self.traced
        if index == len(self.sizes) - 1:
            self.traced = None
        if whole is None or whole[0] is not x:
            return None
        start = sum(self.sizes[:index])
        return whole[1][:, start : start + self.sizes[index]]


Place = tuple[_Group, int]
"""A group, and which of its readers one is."""


class Fused:
    """Multiplies once for Linears that read the same codes one after another, each time as they were first seen to.

    The first pass shows who reads what. From then on the first reader of a group multiplies for all, and the others fetch
    their part; sums of integers are the same either way. A group that is once not called so is taken apart for good, and who
    once reads alone stays alone.
    """

    def __init__(self) -> None:
        self._reading: weakref.ref[IntegerRows] | None = None
        self._readers: list[weakref.ref[Reader]] = []

    def part(self, reader: Reader, rows: IntegerRows, lead: Sequence[int]) -> torch.Tensor | None:
        """Returns the sums of `reader` times all scales, float32 (*lead, out), a view; None where it multiplies for itself.

        Args:
            reader: who is called.
            rows: what it reads.
            lead: sizes whose product is the number of rows.
        """
        if reader.place is None and not reader.apart:
            self._look(reader, rows)
        # Looking may have made a group of those that were called before, and this may be the first of them again.
        place = reader.place
        if place is None:
            return None
        part = place[0].fetch(place[1], rows, lead)
        if part is None:
            take_apart(reader)
        return part

    def _look(self, reader: Reader, rows: IntegerRows) -> None:
        """Notes who reads, and makes a group of who have read what was read before."""
        if self._reading is not None and self._reading() is rows:
            self._readers.append(weakref.ref(reader))
            return
        seen = list(dict.fromkeys(r for r in (ref() for ref in self._readers) if r is not None))
        self._readers, self._reading = [weakref.ref(reader)], weakref.ref(rows)
        if len(seen) > 1:
            _fuse(seen)
        elif seen:
            # Not looked at again: to watch a Linear that reads alone takes a tenth of its call at one row.
            seen[0].apart = True


def _fuse(seen: list[Reader]) -> None:
    first = seen[0].stacking()
    alike = [r for r in seen if not r.apart and r.place is None and r.stacking() == first]
    if len(alike) < 2:
        return
    found = alike[0].stacked(alike[1:])
    if found is None:
        for reader in alike:
            reader.apart = True
        return
    multiplier, weight = found
    multiplier.take(weight)
    group, start = _Group(alike, multiplier), 0
    for index, reader in enumerate(alike):
        end = start + reader.out_features
        zero = None if weight.zero is None else weight.zero[start:end]
        reader.rest_on(IntegerWeight(weight.codes[start:end], weight.scale[start:end], zero))
        reader.place, start = (group, index), end


def take_apart(reader: Reader) -> None:
    """Takes the group of `reader` apart: its weight has changed or moved, or it is called otherwise."""
    for other in reader.place[0].readers if reader.place is not None else ():
        if (found := other()) is not None:
            found.place, found.apart = None, True


def group_bits(reader: Reader) -> float:
    """Returns the bits a weight that the kernels of its group hold beside codes of one byte."""
    return 0.0 if reader.place is None else reader.place[0].multiplier.held_bits()


def traced_sums(multiplier: Multiplier, x: torch.Tensor, bits: int, out: int) -> torch.Tensor:
    """Returns sums times all scales, float32 (rows, out), of x (..., in) that a compiler traces; codes of so many bits, a scale a row."""
    rounded, step = traced_rows(x.reshape(-1, x.shape[-1]), bits)
    return integer_sums(rounded, step, multiplier.handle, out) * step


def stack(weights: Sequence[IntegerWeight]) -> IntegerWeight:
    """Returns the rows of several weights of one format as one weight."""
    zeros = [w.zero for w in weights if w.zero is not None]
    return IntegerWeight(
        torch.cat([w.codes for w in weights]),
        torch.cat([w.scale for w in weights]),
        torch.cat(zeros) if zeros else None,
    )
