"""Where the parameters are: all in memory, or on disk with one module's worth in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Weights(Protocol):
    """Brings parameters into memory."""

    @property
    def resident(self) -> bool:
        """Whether everything is in memory all the time."""

    def hold(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside the context, the parameters of the submodules `names` are in memory."""


class ResidentWeights:
    """Everything is in memory all the time."""

    resident = True

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Does nothing."""
        yield


class OffloadedWeights:
    """Parameters are read from disk when a module is held, and dropped after.

    Args:
        model: the model; its offloaded parameters are on the meta device.
        source: stored tensors by full parameter name, read when asked for (accelerate's `OffloadedWeightsLoader`).
        tied: full names of parameters that are another one's tensor, to that one's name.
        convert: makes a stored tensor into what the baseline computes with (rounding, arithmetic type).
        device: where the arithmetic happens.
    """

    resident = False

    def __init__(
        self,
        model: nn.Module,
        source: Mapping[str, Any],
        tied: Mapping[str, str],
        convert: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ):
        self._model, self._source, self._tied, self._convert, self._device = model, source, dict(tied), convert, device

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Reads what the submodules `names` need; on leaving, their meta parameters are put back."""
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        read: dict[str, nn.Parameter] = {}
        try:
            for module, name, full in self._entries(names):
                stored = self._tied.get(full, full)
                if stored not in read:
                    value = self._convert(self._source[stored].to(self._device))
                    read[stored] = nn.Parameter(value, requires_grad=False)
                held.append((module, name, module._parameters[name]))  # type: ignore[arg-type]
                module._parameters[name] = read[stored]
            yield
        finally:
            for module, name, before in held:
                module._parameters[name] = before

    def _entries(self, names: Iterable[str]) -> Iterator[tuple[nn.Module, str, str]]:
        seen: set[str] = set()
        for outer in names:
            for inner, module in self._model.get_submodule(outer).named_modules():
                prefix = ".".join(p for p in (outer, inner) if p)
                for name, parameter in list(module.named_parameters(recurse=False)):
                    full = f"{prefix}.{name}" if prefix else name
                    if full not in seen and parameter.device.type == "meta":
                        seen.add(full)
                        yield module, name, full
