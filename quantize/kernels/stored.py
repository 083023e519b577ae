"""Which kernel multiplies by a weight as it is stored: integers where the formats are made of them, else a whole Linear's kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quantize.codecs.base import stored_bytes
from quantize.kernels.base import SIMULATED, registered
from quantize.kernels.choice import AUTO, Choice, Multiplier
from quantize.kernels.fastest import Fastest, Keeper, KernelMismatch, Timings
from quantize.kernels.floating import FloatKernel, StoredWeight, registered_floating
from quantize.kernels.matmul import linear
from quantize.spec.quant_spec import QuantSpec

DECODED = "decoded"
"""The reference: the weight is decoded at each call, multiplied by, and let go."""
HOLD_BITS = 8.0
"""Bits a weight that kernels may hold beside what is stored, unless a user says otherwise: codes one a byte."""
Rounding = Callable[[torch.Tensor], torch.Tensor]
"""Rounds an activation (..., in) to the input's format."""
SLACK = 8
"""Units of rounding that a sum of products may be off by, times the sum of their magnitudes."""


def stored_names() -> tuple[str, ...]:
    """Returns what may be asked for: ``auto``, ``simulated``, and every kernel's name."""
    return (AUTO, SIMULATED, *registered(), *registered_floating())


@dataclass(frozen=True)
class Able:
    """What can multiply by a stored weight: integer kernels, or kernels of whole Linears; and why not, where there is none."""

    integer: bool
    floating: tuple[FloatKernel, ...]
    reason: str

    @property
    def any(self) -> bool:
        """Whether a kernel can."""
        return self.integer or bool(self.floating)


def able(
    choice: Choice,
    weight: QuantSpec,
    inputs: QuantSpec | None,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Able:
    """Returns who may multiply for a Linear of `shape` (out, in) in a model of `dtype`, of those that `choice` wants."""
    if choice.wanted == SIMULATED:
        return Able(False, (), "asked for")
    integers, why = choice.candidates(weight, inputs, shape, device)
    if integers:
        return Able(True, (), "")
    refusals, found = [] if choice.wanted == AUTO else [why] * bool(why), []
    for name, kernel in registered_floating().items():
        if choice.wanted not in {AUTO, name}:
            continue
        refusal = kernel.refusal(weight, inputs, shape, device, dtype)
        held = kernel.held_bits(weight, dtype)
        if refusal is None and choice.wanted == AUTO and held > choice.hold_bits:
            refusal = f"it would hold {held:g} bits a weight, and hold_bits is {choice.hold_bits:g}"
        if refusal is None:
            found.append(kernel)
        else:
            refusals.append(f"{name}: {refusal}")
    return Able(False, tuple(found), "" if found else "; ".join(refusals))


class Products(Fastest[torch.Tensor]):
    """Multiplies for one Linear by kernels of whole Linears; weights decoded at each call are the reference among them.

    Args:
        kernels: those that can.
        what: names formats, shape, device and type among the timings.
        rounding: what the input is rounded by, for kernels that do not; None where it is not.
        timings: see `Choice`.
        keeper: see `Choice`.
        reference: whether decoding at each call takes part: not where a kernel was asked for by name.
    """

    def __init__(
        self,
        kernels: tuple[FloatKernel, ...],
        what: str,
        rounding: Rounding | None,
        timings: Timings,
        keeper: Keeper | None = None,
        reference: bool = True,
    ):
        super().__init__([*[DECODED] * reference, *(k.name for k in kernels)], what, timings, keeper)
        self.kernels, self._rounding = kernels, rounding
        self._weight: StoredWeight | None = None

    def forget(self) -> None:
        """Lets what was packed go: the weight is about to change or move."""
        super().forget()
        self._weight = None

    def take(self, weight: StoredWeight) -> None:
        """Takes the weight to multiply by."""
        self.forget()
        self._weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the Linear's output (..., out) for `x` (..., in), in its type."""
        y = self.run(x, x.numel() // x.shape[-1])
        return y if bias is None else y.add_(bias)

    def held_bits(self) -> float:
        """Returns the bits a weight that kernels hold at present, beside what is stored."""
        weight = self._held()
        return sum(k.held_bits(weight.spec, weight.dtype) for k in self.kernels if k.name in self._prepared)

    def read_bits(self, rows: int) -> float | None:
        """Returns the bits a weight that the fastest kernel for so many rows reads; None where it reads what is stored."""
        weight, name = self._held(), self.fastest(rows)
        kernel = next((k for k in self.kernels if k.name == name), None)
        if kernel is not None:
            return kernel.held_bits(weight.spec, weight.dtype) or None
        return 8 * stored_bytes(weight.stored) / (weight.shape[0] * weight.shape[1]) + 16 * weight.dtype.itemsize

    def _weight_bytes(self) -> int:
        return stored_bytes(self._held().stored)

    def _held(self) -> StoredWeight:
        if self._weight is None:
            raise ValueError("weight: none was taken: call take first")
        return self._weight

    def _prepare(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = self._held()
        kernel = next((k for k in self.kernels if k.name == name), None)
        product = _decoding(weight) if kernel is None else kernel.prepare(weight)
        rounding = None if kernel is not None and kernel.rounds else self._rounding
        out = weight.shape[0]

        def multiply(x: torch.Tensor) -> torch.Tensor:
            rounded = x if rounding is None else rounding(x)
            return product(rounded.reshape(-1, x.shape[-1])).view(*x.shape[:-1], out)

        return multiply

    def _check(self, results: Mapping[str, torch.Tensor], given: torch.Tensor) -> None:
        weight = self._held()
        magnitude = weight.dequantized().float().abs()
        x = given.float()
        bound = SLACK * torch.finfo(weight.dtype).eps * linear(x.abs(), magnitude)
        if weight.inputs is not None:
            # Where a value lies between two codes, the order of two divisions decides: a step of the input's grid.
            bound += x.abs().amax(-1, keepdim=True) * magnitude.amax() / 2 ** (weight.inputs.bits - 2)
        bound += torch.finfo(weight.dtype).tiny
        first = next(iter(results))
        for name, y in results.items():
            if bool(((y.float() - results[first].float()).abs() > bound).any()):
                raise KernelMismatch(f"{self._what}: {name} and {first} differ by more than rounding")

    def __getstate__(self) -> dict[str, object]:
        """A copy packs for itself: what kernels pack cannot be copied."""
        return {**super().__getstate__(), "_weight": None}


def products(
    choice: Choice,
    weight: QuantSpec,
    inputs: QuantSpec | None,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    rounding: Rounding | None,
) -> Multiplier | Products | None:
    """Returns what multiplies for a Linear of `shape` (out, in), or None where its weight is decoded at each call; counts which."""
    found = able(choice, weight, inputs, shape, device, dtype)
    if found.integer:
        return choice.multiplier(weight, inputs, shape, device)
    if not found.floating:
        choice.refuse(found.reason)
        return None
    what = f"{weight} x {inputs} {shape} {device.type} {dtype}"
    named = choice.wanted != AUTO
    name = found.floating[0].name if len(found.floating) == 1 else "the fastest of several"
    choice.ran[name] = choice.ran.get(name, 0) + 1
    return Products(found.floating, what, rounding, choice.timings, choice.keeper, reference=not named)


def _decoding(weight: StoredWeight) -> Callable[[torch.Tensor], torch.Tensor]:
    def multiply(x: torch.Tensor) -> torch.Tensor:
        return linear(x, weight.dequantized())

    return multiply
