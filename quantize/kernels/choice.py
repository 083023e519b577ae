"""Which kernel multiplies: one by name, or of those that can the one that is fastest here, which changes no bit."""

import importlib
import pkgutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

import quantize.kernels
from quantize.kernels.base import (
    SIMULATED,
    IntegerRows,
    IntegerWeight,
    Kernel,
    Multiply,
    finish,
    format_refusal,
    registered,
)
from quantize.spec.quant_spec import QuantSpec

AUTO = "auto"
ROUNDS = 3
"""Calls of a kernel whose least time counts, after one that warms it up."""

# A kernel is a module of this package that registers itself, as a format is one of `quantize.codecs`.
for _module in pkgutil.iter_modules(quantize.kernels.__path__):
    if _module.name != "choice":
        importlib.import_module(f"quantize.kernels.{_module.name}")


def names() -> tuple[str, ...]:
    """Returns what may be asked for: ``auto``, ``simulated``, and every kernel's name."""
    return (AUTO, SIMULATED, *registered())


@dataclass
class Choice:
    """Which kernel is wanted, and what has been found about those that are there.

    Attributes:
        wanted: ``auto``, ``simulated`` or a kernel's name.
        timings: milliseconds of each kernel by what was multiplied, as they were found; kept by whoever keeps them.
        ran: number of Linears by the kernel that they have, filled as they get it.
        refused: number of Linears that are simulated, by the reason.
    """

    wanted: str = AUTO
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    def candidates(
        self, weight: QuantSpec | None, inputs: QuantSpec | None, shape: tuple[int, int], device: torch.device
    ) -> tuple[list[Kernel], str]:
        """Returns the kernels that may multiply a weight of this format and `shape` (out, in), and why where there is none."""
        if self.wanted == SIMULATED:
            return [], "asked for"
        reason = format_refusal(weight, inputs)
        if reason is not None or weight is None or inputs is None:
            return [], reason or ""
        wanted = [k for name, k in registered().items() if self.wanted in {AUTO, name}]
        refusals = {k.name: k.refusal(weight, inputs, shape, device) for k in wanted}
        able = [k for k in wanted if refusals[k.name] is None]
        return able, "" if able else "; ".join(f"{name}: {why}" for name, why in refusals.items())

    def refuse(self, reason: str) -> None:
        """Counts a Linear that is simulated for `reason`."""
        self.ran[SIMULATED] = self.ran.get(SIMULATED, 0) + 1
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def multiplier(
        self, weight: QuantSpec | None, inputs: QuantSpec | None, shape: tuple[int, int], device: torch.device
    ) -> "Multiplier | None":
        """Returns what multiplies for one Linear, or None where it is simulated; counts which."""
        able, reason = self.candidates(weight, inputs, shape, device)
        if not able:
            self.refuse(reason)
            return None
        what = f"{weight} x {inputs} {shape} {device.type}"
        if len(able) == 1:
            self.ran[able[0].name] = self.ran.get(able[0].name, 0) + 1
        else:
            self.ran["integer"] = self.ran.get("integer", 0) + 1
        return Multiplier(able, what, self.timings)


class Multiplier:
    """Multiplies for one Linear by whichever kernel is fastest for the number of rows; all of them give the same bits.

    For each power of two of rows all kernels run on what comes first, and the fastest is kept. Weights are packed when a
    kernel is first used.

    Args:
        kernels: those that can.
        what: names formats, shape and device among `timings`.
        timings: see `Choice`.
    """

    def __init__(self, kernels: list[Kernel], what: str, timings: dict[str, dict[str, float]]):
        self.kernels, self._what, self._timings = kernels, what, timings
        self._weight: IntegerWeight | None = None
        self._prepared: dict[str, Multiply] = {}

    def forget(self) -> None:
        """Lets what was packed go: the weight is about to change or move."""
        self._weight = None
        self._prepared.clear()

    @property
    def ready(self) -> bool:
        """Whether there is a weight to multiply by."""
        return self._weight is not None

    def take(self, weight: IntegerWeight) -> None:
        """Takes the weight to multiply by."""
        self.forget()
        self._weight = weight

    def __call__(self, rows: IntegerRows, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Returns the Linear's output (rows, out) in `dtype`."""
        return finish(self._sums(rows), rows, bias, dtype)

    def fastest(self, rows: int) -> str | None:
        """Returns the kernel's name for so many rows; None where they have not been timed yet."""
        if len(self.kernels) == 1:
            return self.kernels[0].name
        found = self._timings.get(self._key(rows), {})
        able = {k.name for k in self.kernels}
        return min(found, key=found.__getitem__) if found.keys() == able else None

    def _key(self, rows: int) -> str:
        return f"{self._what} {1 << max(rows - 1, 0).bit_length()} rows"

    def _sums(self, rows: IntegerRows) -> torch.Tensor:
        name = self.fastest(len(rows.codes))
        if name is not None:
            return self._of(name)(rows)
        timings: dict[str, float] = {}
        sums = rows.scale
        for kernel in self.kernels:
            multiply = self._of(kernel.name)
            sums = multiply(rows)
            timings[kernel.name] = min(_milliseconds(multiply, rows) for _ in range(ROUNDS))
        self._timings[self._key(len(rows.codes))] = timings
        self._keep_used()
        return sums

    def _of(self, name: str) -> Multiply:
        if name not in self._prepared:
            if self._weight is None:
                raise ValueError("weight: none was taken: call take first")
            kernel = next(k for k in self.kernels if k.name == name)
            self._prepared[name] = kernel.prepare(self._weight)
        return self._prepared[name]

    def _keep_used(self) -> None:
        """Drops the packed form of kernels that have won for no number of rows so far."""
        winners = {min(t, key=t.__getitem__) for key, t in self._timings.items() if key.startswith(f"{self._what} ")}
        self._prepared = {name: multiply for name, multiply in self._prepared.items() if name in winners}

    def __getstate__(self) -> dict[str, object]:
        """A copy packs for itself: what kernels pack cannot be copied."""
        return {**self.__dict__, "_weight": None, "_prepared": {}}


def describe(ran: Mapping[str, int], refused: Mapping[str, int]) -> str:
    """Returns in a sentence who multiplies, and why some Linears are simulated."""
    parts = [f"{count} Linears by {name}" for name, count in sorted(ran.items())]
    why = [f"{count} simulated: {reason}" for reason, count in refused.items()]
    return "kernels: " + ", ".join(parts or ["no Linears"]) + "".join(f" ({line})" for line in why)


def _milliseconds(multiply: Multiply, rows: IntegerRows) -> float:
    if rows.codes.device.type == "cuda":
        torch.cuda.synchronize(rows.codes.device)
    start = time.perf_counter()
    multiply(rows)
    if rows.codes.device.type == "cuda":
        torch.cuda.synchronize(rows.codes.device)
    return 1e3 * (time.perf_counter() - start)
