"""The fastest of several that give the same: found by a short timing for each power of two of rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from quantize.kernels.opaque import handle_of

ROUNDS, MOST_ROUNDS, ENOUGH = 3, 20, 5.0
"""Calls of each kernel, in turn, whose least time counts, after one that warms it up: at least so many, more up to so many milliseconds."""
ALIKE, PATIENCE = 1.25, 100.0
"""A least time counts when another call came within this factor of it. Where none does, something else has the cores, and calls go
on up to so many milliseconds of all kernels together: what is kept from a disturbed moment would be taken ever after.
"""
EVICTED, LINEARS = 64 << 20, 128
"""Bytes, at most, that are read before each call that is timed on a CPU, and Linears that a model is taken to have: the weights of a model
that is larger than the caches do not lie in them when their turn comes. Who wins on a weight that does may lose by a half on one
that does not.
"""
Given = TypeVar("Given")
Timings = dict[str, dict[str, float]]
"""Milliseconds of each kernel by what was multiplied."""


class KernelMismatch(ValueError):
    """Two kernels gave results that differ by more than rounding."""


class Keeper(Protocol):
    """Keeps timings beyond a process."""

    def recall(self) -> Timings:
        """Returns what is kept."""

    def keep(self, timings: Timings) -> None:
        """Keeps timings beside what is kept already."""


class Nowhere:
    """Keeps timings for as long as the process lives only."""

    def recall(self) -> Timings:
        """Returns nothing."""
        return {}

    def keep(self, timings: Timings) -> None:
        """Does nothing."""


class Fastest(Generic[Given]):
    """Multiplies for one Linear by whichever kernel is fastest for the number of rows.

    For each power of two of rows all kernels run on what comes first, their results are compared, and the fastest is kept.
    Weights are packed when a kernel is first used; what has won for no number of rows is let go.

    Args:
        names: the kernels that can.
        what: names formats, shape and device among `timings`.
        timings: what has been timed before, and is from now on.
        keeper: asked before something is timed, and told after it.

    Attributes:
        handle: what compiled code finds it by.
    """

    def __init__(
        self,
        names: Sequence[str],
        what: str,
        timings: Timings,
        keeper: Keeper | None = None,
    ):
        self.names, self._what, self._timings = tuple(names), what, timings
        self._keeper: Keeper = Nowhere() if keeper is None else keeper
        self._prepared: dict[str, Callable[[Given], torch.Tensor]] = {}
        # By the bits of the number of rows: what a call costs beside the product is one look into it.
        self._by_size: dict[int, Callable[[Given], torch.Tensor]] = {}
        self.handle = handle_of(self)

    def _prepare(self, name: str) -> Callable[[Given], torch.Tensor]:
        """Returns the product by the kernel `name`."""
        raise TypeError(f"{type(self).__name__} does not say how a kernel is prepared")

    def _check(self, results: Mapping[str, torch.Tensor], given: Given) -> None:
        """Raises `KernelMismatch` where `results`, by kernel, differ by more than rounding."""
        raise TypeError(f"{type(self).__name__} does not say what may differ")

    def _weight_bytes(self) -> int:
        """Returns the bytes of the weight as it is stored, 0 where there is none."""
        return 0

    def _few_rows(self, name: str) -> Callable[[Given], torch.Tensor] | None:
        """Returns the product by the kernel `name` with a few of the weight's rows; None where it cannot be had."""
        return None

    def forget(self) -> None:
        """Lets what was packed go: the weight is about to change or move."""
        self._prepared.clear()
        self._by_size.clear()

    def fastest(self, rows: int) -> str | None:
        """Returns the kernel's name for so many rows; None where they have not been timed yet."""
        if len(self.names) == 1:
            return self.names[0]
        found = self._timings.get(self._key(rows), {})
        return min(found, key=found.__getitem__) if found.keys() == set(self.names) else None

    def _key(self, rows: int) -> str:
        return f"{self._what} {1 << max(rows - 1, 0).bit_length()} rows"

    def run(self, given: Given, rows: int) -> torch.Tensor:
        """Returns the product with `given`, which has so many rows."""
        known = self._by_size.get((rows - 1).bit_length())
        return known(given) if known is not None and rows else self._find(given, rows)

    def _find(self, given: Given, rows: int) -> torch.Tensor:
        name = self.fastest(rows) if rows else next(iter(self._prepared), self.names[0])
        if name is None:
            # Another model may have timed it meanwhile: what it found is taken, so that both round alike.
            self._timings.update({**self._keeper.recall(), **self._timings})
            name = self.fastest(rows)
        if name is None:
            return self._time(given, rows)
        multiply = self._of(name)
        if rows:
            self._by_size[(rows - 1).bit_length()] = multiply
        return multiply(given)

    def _time(self, given: Given, rows: int) -> torch.Tensor:
        products = {name: self._of(name) for name in self.names}
        results = {name: multiply(given) for name, multiply in products.items()}
        self._check(results, given)
        device = results[self.names[0]].device
        others = min(EVICTED, LINEARS * self._weight_bytes()) if device.type == "cpu" else 0
        few = {name: product for name in products if (product := self._few_rows(name)) is not None} if others else {}
        between = torch.ones(others // 4)

        def leave_the_caches_cold(name: str) -> None:
            """Leaves them as a model's pass does: without the weight, but with the program."""
            between.sum()
            if name in few:
                few[name](given)

        self._timings[self._key(rows)] = _least_milliseconds(products, given, device, leave_the_caches_cold)
        self._keeper.keep(self._timings)
        winners = {min(t, key=t.__getitem__) for key, t in self._timings.items() if key.startswith(f"{self._what} ")}
        self._prepared = {name: multiply for name, multiply in self._prepared.items() if name in winners}
        return results[self.fastest(rows) or self.names[0]]

    def _of(self, name: str) -> Callable[[Given], torch.Tensor]:
        if name not in self._prepared:
            self._prepared[name] = self._prepare(name)
        return self._prepared[name]

    def __getstate__(self) -> dict[str, object]:
        """A copy packs for itself: what kernels pack cannot be copied."""
        return {**self.__dict__, "_prepared": {}, "_by_size": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy is found by a handle of its own."""
        self.__dict__.update(state, handle=handle_of(self))


def _least_milliseconds(
    products: Mapping[str, Callable[[Given], torch.Tensor]],
    given: Given,
    device: torch.device,
    before: Callable[[str], None],
) -> dict[str, float]:
    """Returns the least time of each kernel; they take turns, so that what disturbs one disturbs the others. `before` is called with the
    kernel's name ahead of each call.
    """
    times: dict[str, list[float]] = {name: [] for name in products}
    while any(len(found) < ROUNDS for found in times.values()) or (
        not all(map(_enough, times.values())) and sum(map(sum, times.values())) < PATIENCE
    ):
        for name, multiply in products.items():
            before(name)
            times[name].append(_milliseconds(multiply, given, device))
    return {name: min(found) for name, found in times.items()}


def _enough(times: Sequence[float]) -> bool:
    if len(times) < MOST_ROUNDS and sum(times) < ENOUGH:
        return False
    least, second = sorted(times)[:2]
    return second <= ALIKE * least


def _milliseconds(multiply: Callable[[Given], torch.Tensor], given: Given, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    multiply(given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
