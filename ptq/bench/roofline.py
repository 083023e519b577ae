"""What this machine can do at best: products a second by type, bytes read a second; and where a Linear lies under that."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ptq.bench.timing import clock_of

SIZE = (512, 2048, 2048)
"""Rows, inner and columns of the products that are timed: large enough that arithmetic counts alone."""
LARGE = (4096, 4096, 4096)
"""The same on a GPU."""
READ = 1 << 28
"""Bytes that are read: more than caches hold."""
ROUNDS = 5


@dataclass(frozen=True)
class Roofline:
    """The machine's limits.

    Attributes:
        operations: multiplications and additions a second by type: float32, bfloat16, int8.
        bandwidth: bytes read a second.
    """

    operations: dict[str, float]
    bandwidth: float

    def least_seconds(self, rows: int, shape: tuple[int, int], kind: str, bits: float) -> float:
        """Returns the time that a product takes at least: arithmetic, or reading the weight, whichever is longer.

        Args:
            rows: of the activation.
            shape: (out, in).
            kind: a key of `operations`.
            bits: that are read a weight.
        """
        weights = shape[0] * shape[1]
        return max(2 * rows * weights / self.operations[kind], weights * bits / 8 / self.bandwidth)


def measured(device: torch.device) -> Roofline:
    """Measures both on `device`, with torch's own products."""
    rows, inner, columns = SIZE if device.type == "cpu" else LARGE
    clock = clock_of(device)
    x, w = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    a, b = (t.mul(16).to(torch.int8) for t in (x, w))
    half = x.bfloat16(), w.bfloat16()
    work = 2 * rows * inner * columns
    b = b.t().contiguous().t()  # As weights lie: a row's codes side by side.
    products: dict[str, Callable[[], object]] = {
        "float32": lambda: x @ w, "bfloat16": lambda: half[0] @ half[1], "int8": lambda: torch._int_mm(a, b),
    }  # fmt: skip
    data = torch.ones(READ // 8, dtype=torch.int64, device=device)
    return Roofline({name: work / _least(run, clock) for name, run in products.items()}, READ / _least(data.max, clock))


def _least(run: Callable[[], object], clock: Callable[[], float]) -> float:
    run()
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)
