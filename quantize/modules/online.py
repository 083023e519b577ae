"""Online transforms: what is computed at a Linear's input or output each time that it is called."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

INPUT, OUTPUT = "online_input", "online_output"
"""Names of the children of a Linear that hold what acts on its input and on its output."""


class OnlineShared(nn.Module):
    """A transform of a tensor (..., channels) that remembers the last one: Linears that read the same tensor share it.

    What it gives for one tensor is one object, so that input quantizers behind it are shared too.

    Args:
        inner: the transform, a module from (..., channels) to the same shape.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the transformed tensor."""
        if x.is_inference() or torch.is_grad_enabled():
            # No version to go by, or a graph that must not be entered twice.
            result: torch.Tensor = self.inner(x)
            return result
        if self._last is not None:
            reference, version, result = self._last
            if reference() is x and version == x._version:
                return result
        result = self.inner(x)
        self._last = (weakref.ref(x, self._forget), x._version, result)
        return result

    def _forget(self, reference: object) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, object]:
        """A copy starts without the remembered tensor: weak references cannot be copied."""
        return {**self.__dict__, "_last": None}


def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_submodule(INPUT)(args[0]), *args[1:])


def _after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.get_submodule(OUTPUT)(output)
    return result


def attach_input(linear: nn.Module, transform: nn.Module) -> None:
    """Lets `transform` act on what `linear` reads, before it is quantized or looked at by hooks that come later.

    Raises:
        ValueError: when something acts there already.
    """
    _attach(linear, INPUT, transform)
    linear.register_forward_pre_hook(_before)


def attach_output(linear: nn.Module, transform: nn.Module) -> None:
    """Lets `transform` act on what `linear` gives.

    Raises:
        ValueError: when something acts there already.
    """
    _attach(linear, OUTPUT, transform)
    linear.register_forward_hook(_after)


def _attach(linear: nn.Module, name: str, transform: nn.Module) -> None:
    if hasattr(linear, name):
        raise ValueError(f"{name}: a transform acts there already: compose the two into one")
    linear.add_module(name, transform)


def online_input(linear: nn.Module) -> nn.Module | None:
    """Returns what acts on the input of `linear`, or None."""
    return getattr(linear, INPUT, None)


def online_output(linear: nn.Module) -> nn.Module | None:
    """Returns what acts on the output of `linear`, or None."""
    return getattr(linear, OUTPUT, None)


def carry_online(old: nn.Module, new: nn.Module) -> None:
    """Lets what acts on the input and the output of `old` act on those of `new`, which takes its place."""
    if (before := online_input(old)) is not None:
        attach_input(new, before)
    if (after := online_output(old)) is not None:
        attach_output(new, after)


def online_bytes(linears: Iterable[nn.Module]) -> int:
    """Returns the bytes of the numbers that act on what `linears` read and give, at 2 a number; shared ones count once.

    What is made from a seed stores nothing.
    """
    found: dict[int, int] = {}
    for linear in linears:
        for transform in (online_input(linear), online_output(linear)):
            if transform is not None:
                found |= {tensor.data_ptr(): tensor.numel() for tensor in transform.state_dict().values()}
    return 2 * sum(found.values())


def output_of(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns what `linear` gives for `x` that has passed what acts on its input already, as hooks see it."""
    y: torch.Tensor = linear.forward(x)
    after = online_output(linear)
    return y if after is None else after(y)
