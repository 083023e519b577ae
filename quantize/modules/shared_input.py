"""What the Linears that read one tensor share: its codes, or its rounded values, computed once."""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from quantize.kernels.base import IntegerRows, integer_rows
from quantize.modules.fused import Fused
from quantize.modules.simulated import fake_quantize_dynamic
from quantize.spec.quant_spec import QuantSpec


class SharedInput:
    """Remembers what was last made of an activation; it goes when the activation does.

    Attributes:
        fused: who reads the same codes.
    """

    def __init__(self) -> None:
        self.fused = Fused()
        self._last: tuple[weakref.ref[torch.Tensor], int, Any, QuantSpec, Any] | None = None

    def codes(self, x: torch.Tensor, spec: QuantSpec) -> IntegerRows:
        """Returns `x` (..., channels) as integer kernels take it."""
        found: IntegerRows = self._recall(x, spec, _codes)
        return found

    def rounded(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns `x` (..., channels) rounded to the format, in its own type."""
        found: torch.Tensor = self._recall(x, spec, fake_quantize_dynamic)
        return found

    def _recall(self, x: torch.Tensor, spec: QuantSpec, make: Callable[[torch.Tensor, QuantSpec], Any]) -> Any:
        if x.is_inference():
            # Tensors of inference mode count no versions: a change in place could not be told from the same values.
            return make(x, spec)
        last = self._last
        # The formats are most often one object: to compare all fields costs as much as an operation.
        same = last is not None and last[0]() is x and last[1] == x._version and last[2] is make
        if last is not None and same and (last[3] is spec or last[3] == spec):
            return last[4]
        made = make(x, spec)
        self._last = (weakref.ref(x, self._forget), x._version, make, spec, made)
        return made

    def _forget(self, reference: object) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, object]:
        """A copy starts without the remembered tensor: weak references cannot be copied."""
        return {"_last": None, "fused": Fused()}


def _codes(x: torch.Tensor, spec: QuantSpec) -> IntegerRows:
    return integer_rows(x, spec, None)
