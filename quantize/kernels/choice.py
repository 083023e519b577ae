"""Which kernel multiplies: one by name, or of those that can the one that is fastest here, which changes no bit."""

import importlib
import math
import pkgutil
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
from quantize.kernels.fastest import Fastest, Keeper, KernelMismatch, Timings
from quantize.spec.quant_spec import QuantSpec

AUTO = "auto"
FEW = 16
"""Rows of a weight whose product brings a kernel's program into the caches."""

# A kernel is a module of this package that registers itself, as a format is one of `quantize.codecs`.
for _module in pkgutil.iter_modules(quantize.kernels.__path__):
    if _module.name not in {"choice", "stored"}:
        importlib.import_module(f"quantize.kernels.{_module.name}")


def names() -> tuple[str, ...]:
    """Returns what may be asked for: ``auto``, ``simulated``, and every kernel's name."""
    return (AUTO, SIMULATED, *registered())


@dataclass
class Choice:
    """Which kernel is wanted, and what has been found about those that are there.

    Attributes:
        wanted: ``auto``, ``simulated`` or a kernel's name.
        timings: milliseconds of each kernel by what was multiplied, as they were found.
        keeper: asked before something is timed, and told after it.
        hold_bits: bits a weight that a kernel may hold beside what is stored.
        ran: number of Linears by the kernel that they have, filled as they get it.
        refused: number of Linears that are simulated, by the reason.
    """

    wanted: str = AUTO
    timings: Timings = field(default_factory=dict)
    keeper: Keeper | None = None
    hold_bits: float = math.inf
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
        refusals = {k.name: k.refusal(weight, inputs, shape, device) or self._too_large(k, weight) for k in wanted}
        able = [k for k in wanted if refusals[k.name] is None]
        return able, "" if able else "; ".join(f"{name}: {why}" for name, why in refusals.items())

    def _too_large(self, kernel: Kernel, weight: QuantSpec) -> str | None:
        """Returns why a kernel that `auto` would take holds too much; one that is asked for by name may hold what it wants."""
        held = kernel.held_bits + (0 if weight.bits == 8 and weight.symmetric else 8)
        if self.wanted != AUTO or held <= self.hold_bits:
            return None
        return f"it would hold {held:g} bits a weight, and hold_bits is {self.hold_bits:g}"

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
        return Multiplier(able, what, self.timings, self.keeper)


class Multiplier(Fastest[IntegerRows]):
    """Multiplies integers for one Linear; all kernels give the same bits.

    Args:
        kernels: those that can.
        what: names formats, shape and device among the timings.
        timings: see `Choice`.
        keeper: see `Choice`.
    """

    def __init__(
        self,
        kernels: list[Kernel],
        what: str,
        timings: Timings,
        keeper: Keeper | None = None,
    ):
        super().__init__([k.name for k in kernels], what, timings, keeper)
        self.kernels = kernels
        self._weight: IntegerWeight | None = None

    def forget(self) -> None:
        """Lets what was packed go: the weight is about to change or move."""
        super().forget()
        self._weight = None

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
        return finish(self.run(rows, len(rows)), rows.scale, bias, dtype)

    def held_bits(self) -> float:
        """Returns the bits a weight that kernels hold at present, beside codes of one byte."""
        return sum(k.held_bits for k in self.kernels if k.name in self._prepared)

    def _weight_bytes(self) -> int:
        return 0 if self._weight is None else self._weight.codes.numel()

    def _few_rows(self, name: str) -> Multiply | None:
        if self._weight is None:
            return None
        codes, scale, zero = self._weight.codes, self._weight.scale, self._weight.zero
        few = IntegerWeight(codes[:FEW], scale[:FEW], None if zero is None else zero[:FEW])
        return self._kernel(name).prepare(few)

    def _prepare(self, name: str) -> Multiply:
        if self._weight is None:
            raise ValueError("weight: none was taken: call take first")
        return self._kernel(name).prepare(self._weight)

    def _kernel(self, name: str) -> Kernel:
        return next(k for k in self.kernels if k.name == name)

    def _check(self, results: Mapping[str, torch.Tensor], given: IntegerRows) -> None:
        first = next(iter(results))
        for name, sums in results.items():
            if not torch.equal(sums, results[first]):
                raise KernelMismatch(f"{self._what}: {name} gives other sums than {first}: integers have one sum only")

    def __getstate__(self) -> dict[str, object]:
        """A copy packs for itself: what kernels pack cannot be copied."""
        return {**super().__getstate__(), "_weight": None}


def describe(ran: Mapping[str, int], refused: Mapping[str, int]) -> str:
    """Returns in a sentence who multiplies, and why some Linears are simulated."""
    parts = [f"{count} Linears by {name}" for name, count in sorted(ran.items())]
    why = [f"{count} simulated: {reason}" for reason, count in refused.items()]
    return "kernels: " + ", ".join(parts or ["no Linears"]) + "".join(f" ({line})" for line in why)
