"""What lies outside the blocks (embedding, final norm, head): changed for as long as it is held, and put back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from ptq.network.network import Network, replace_module


def set_weight(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Gives `module` another parameter `name`; the old tensor, which may be tied to another module's, stays as it is."""
    old = getattr(module, name, None)
    value = value if value is None or old is None else value.to(old.dtype)
    module.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True)
class OutsideState:
    """Which modules, parameters and buffers stand outside the blocks at one moment; no tensor is copied."""

    network: Network
    held: dict[str, tuple[nn.Module, dict[str, Any], dict[str, Any]]]

    @classmethod
    def of(cls, network: Network, names: Iterable[str] | None = None) -> Self:
        """Notes what stands there now: at these names, or wherever parameters or buffers are."""
        modules = {name: network.model.get_submodule(name) for name in (network.outside if names is None else names)}
        return cls(network, {name: (m, dict(m._parameters), dict(m._buffers)) for name, m in modules.items()})

    def put_back(self) -> None:
        """Makes what was noted stand there again."""
        for name, (module, parameters, buffers) in self.held.items():
            if self.network.model.get_submodule(name) is not module:
                replace_module(self.network.model, name, module)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
