"""Kernels of whole Linears: they read a weight as it is stored and an activation in floating point."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantize.codecs.base import Encoded
from quantize.codecs.packing import unpack
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec

Product = Callable[[torch.Tensor], torch.Tensor]
"""Gives x W^T, (rows, out), of an activation (rows, in), both in the type of the model; the bias is not in it."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight as `quantize.codecs.base.Codec.encode` stores it.

    Attributes:
        stored: what is stored, by name.
        spec: its format.
        inputs: the format of what it meets, or None.
        shape: (out, in).
        dtype: the model's type, in which products are wanted.
    """

    stored: Encoded
    spec: QuantSpec
    inputs: QuantSpec | None
    shape: tuple[int, int]
    dtype: torch.dtype

    def dequantized(self) -> torch.Tensor:
        """Returns the weight (out, in) in the model's type."""
        return codec_of(self.spec).decode(self.stored, self.spec, self.shape, self.dtype)

    def codes(self) -> torch.Tensor:
        """Returns the codes of an integer format, one a byte: (out, in), int8 where it is symmetric, else uint8."""
        return unpack(self.stored["codes"], self.spec.bits, self.shape[1], self.spec.symmetric)

    def scales(self) -> torch.Tensor:
        """Returns an integer format's scales, float32 (out, groups); one group where they are a channel's or the tensor's."""
        scale = self.stored["scale"].float()
        return (scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(self.shape[0], -1)).expand(
            self.shape[0], -1
        )

    def zeros(self) -> torch.Tensor | None:
        """Returns its zero points, uint8 (out, groups), or None."""
        if self.spec.symmetric:
            return None
        count = self.stored["scale"].numel()
        zero = unpack(self.stored["zero_point"], self.spec.bits, count).reshape(-1)
        return (zero.reshape(1, 1) if count == 1 else zero.reshape(self.shape[0], -1)).expand(self.shape[0], -1)


def group_of(spec: QuantSpec, columns: int, sizes: Sequence[int]) -> int | None:
    """Returns the group size that a kernel which takes `sizes` is given for a weight of `columns`: its own, or for one scale a row
    the first that divides it; None where none fits.
    """
    if spec.granularity == "group":
        return spec.group_size if spec.group_size in sizes else None
    return next((size for size in sizes if columns % size == 0), None)


def lacks(packages: Sequence[str], extra: str) -> str | None:
    """Returns in a few words which packages of an optional extra are not installed, and how they are; None where all are."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"it needs {' and '.join(missing)}: pip install 'ptq-framework[{extra}]'" if missing else None


class FloatKernel(Protocol):
    """Who multiplies whole Linears. What it gives is the product of the rounded operands, to the rounding of the model's type.

    Attributes:
        name: what it is asked for by.
        rounds: whether it rounds the activation itself; otherwise it is given a rounded one.
    """

    name: str
    rounds: bool

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Returns in a few words why it cannot multiply by a weight of this format and `shape` (out, in), or None."""

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Returns how many bits a weight it holds beside what is stored."""

    def prepare(self, weight: StoredWeight) -> Product:
        """Returns the product with this weight, whose packed form is kept with it."""


_KERNELS: dict[str, FloatKernel] = {}


def register_floating(kernel: FloatKernel) -> None:
    """Adds a kernel; called where it is written."""
    _KERNELS[kernel.name] = kernel


def registered_floating() -> dict[str, FloatKernel]:
    """Returns the registered kernels by name."""
    return dict(_KERNELS)
