"""Where a Linear's output is added to something that does not depend on it: the residual stream. Found by a probe."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptq.network.network import Block, weight_of
from ptq.network.precise import Call

TOLERANCE = 1e-3
"""Share of the probe that may be lost to rounding; a norm or an activation on the way loses far more."""


def find_sums(call: Call, block: Block, hidden: torch.Tensor) -> dict[str, str]:
    """Returns, by full name of a Linear of the block, the module that reads its output plus a rest, or "" for the block's
    own output being that sum.

    A probe is added to the Linear's output: a tensor that grows by just the probe is such a sum. Of several the last counts
    (a dropout module reads the output alone, before anything was added). Linears whose output reaches the rest of the block
    in no such way are left out.

    Args:
        call: gives the block's output, in float32 or float64 (`ptq.network.precise`).
        block: its weights are in memory.
        hidden: input of the block (1, tokens, channels), in that type.
    """
    width = hidden.shape[-1]
    return _sums(call, block, hidden, {n: m for n, m in block.linears.items() if weight_of(m).shape[0] == width})


def find_norm_sums(call: Call, block: Block, hidden: torch.Tensor) -> dict[str, str]:
    """Returns the same for the block's norms: those whose own output is added to the residual stream (Gemma's, after the
    attention and the MLP). What a norm hands to its readers alone is no sum.
    """
    norms = {f"{block.name}.{n}": m for n, m in block.module.named_modules() if _is_norm(m, hidden.shape[-1])}
    return _sums(call, block, hidden, norms, alone=False)


def _sums(
    call: Call, block: Block, hidden: torch.Tensor, modules: Mapping[str, nn.Module], alone: bool = True
) -> dict[str, str]:
    before = _tensors(call, block, hidden, None, None)
    found: dict[str, str] = {}
    for name, linear in modules.items():
        probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(block.index)).to(hidden)
        probe *= float(before[""].double().std())
        after = _tensors(call, block, hidden, linear, probe)
        own = None if alone else _output(call, hidden, linear)
        for place, tensor in before.items():
            if own is not None and torch.equal(tensor, own):
                continue
            if place in after and _grew_by(tensor, after[place], probe):
                found[name] = place
    return found


def _output(call: Call, hidden: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Returns what the module gives when the block is called."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(
        lambda module, args, output: seen.append(output.reshape(hidden.shape).clone())
    )
    try:
        call(hidden)
    finally:
        handle.remove()
    return seen[-1] if seen else torch.full_like(hidden, torch.nan)


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.shape == (width,) and not any(True for _ in module.children())


def _grew_by(before: torch.Tensor, after: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether `after` is `before` plus `probe` but for rounding, which is relative to the greatest number at hand."""
    error = float((after - before - probe).double().norm() / probe.double().norm())
    rounding = torch.finfo(before.dtype).eps * float(before.double().norm() / probe.double().norm())
    return error <= TOLERANCE + rounding


def _tensors(
    call: Call,
    block: Block,
    hidden: torch.Tensor,
    linear: nn.Module | None,
    probe: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Returns the inputs of the block's modules that have the tokens and channels of `hidden`, in the order of the calls, and
    last the block's output as "". The `probe` is added to the output of `linear`.
    """
    seen: dict[str, torch.Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, torch.Tensor) and x.shape[-1:] == hidden.shape[-1:] and x.numel() == hidden.numel():
                seen.setdefault(f"{block.name}.{name}", x.reshape(hidden.shape).clone())

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in block.module.named_modules() if name]
    try:
        with _added(linear, probe):
            output = call(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return {**seen, "": output}


@contextmanager
def _added(linear: nn.Module | None, probe: torch.Tensor | None) -> Iterator[None]:
    if linear is None or probe is None:
        yield
        return
    handle = linear.register_forward_hook(lambda module, args, output: output + probe.view(output.shape))
    try:
        yield
    finally:
        handle.remove()
