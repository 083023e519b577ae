"""Online transforms: what is computed at a Linear's input or output each time that it is called."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantize.kernels.matmul import is_plain

INPUT, OUTPUT = "online_input", "online_output"
"""Names of the children of a Linear that hold what acts on its input and on its output."""


@dataclass
class _Kept:
    """What a transform gave for one tensor, for so many Linears more that read it."""

    of: weakref.ref[torch.Tensor]
    version: int
    result: torch.Tensor
    left: int


class OnlineShared(nn.Module):
    """A transform of a tensor (..., channels) that remembers what it gave until all Linears that share it have read that.

    What it gives for one tensor is one object, so that input quantizers behind it are shared too. Of batches that take turns
    between two of these Linears each finds its own.

    Args:
        inner: the transform, a module from (..., channels) to the same shape.

    Attributes:
        readers: how many Linears it is attached to.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.readers = 0
        self._kept: dict[int, _Kept] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the transformed tensor."""
        if x.is_inference() or torch.is_grad_enabled():
            # No version to go by, or a graph that must not be entered twice.
            result: torch.Tensor = self.inner(x)
            return result
        number = id(x)
        kept = self._kept.get(number)
        if kept is not None and kept.of() is x and kept.version == x._version:
            kept.left -= 1
            if kept.left < 1:
                del self._kept[number]
            return kept.result
        result = self.inner(x)
        if self.readers > 1:
            # It goes with the tensor, too, where not all come to read it.
            of = weakref.ref(x, lambda _: self._kept.pop(number, None))
            self._kept[number] = _Kept(of, x._version, result, self.readers - 1)
        return result

    def __getstate__(self) -> dict[str, object]:
        """A copy starts without the remembered tensors: weak references cannot be copied."""
        return {**self.__dict__, "_kept": {}}


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
    if isinstance(transform, OnlineShared):
        transform.readers += 1


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
        _attach(new, INPUT, before)
        new.register_forward_pre_hook(_before)
    if (after := online_output(old)) is not None:
        attach_output(new, after)


@contextmanager
def folded_inputs(linears: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context the plain Linears among these multiply what they read by a weight that their online map has been folded
    into, and the map does not act: the same but for rounding, for far less where many tokens pass. A map that has no ``folded``
    acts as before, and so do the hooks that come before it.
    """
    before: list[tuple[nn.Module, nn.Parameter, dict[int, Any]]] = []
    try:
        for linear in linears:
            found = online_input(linear)
            fold = getattr(found.inner if isinstance(found, OnlineShared) else found, "folded", None)
            if fold is None or not is_plain(linear):
                continue
            weight, hooks = linear._parameters["weight"], dict(linear._forward_pre_hooks)
            if weight is None:
                continue
            before.append((linear, weight, hooks))
            linear._parameters["weight"] = nn.Parameter(fold(weight.detach()), requires_grad=False)
            for number, hook in hooks.items():
                if hook is _before:
                    del linear._forward_pre_hooks[number]
        yield
    finally:
        for linear, weight, hooks in before:
            linear._parameters["weight"] = weight
            linear._forward_pre_hooks.clear()
            linear._forward_pre_hooks.update(hooks)


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
