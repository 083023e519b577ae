"""Where a Linear's output is added to something that does not depend on it: the residual stream. Found by a probe."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ptq.network.network import Block, weight_of
from ptq.network.precise import Call
from ptq.network.replaced import hooked

TOLERANCE = 1e-3
"""Share of the probe that may be lost to rounding; a norm or an activation on the way loses far more."""


def find_sums(call: Call, block: Block, hidden: torch.Tensor, norms: Collection[str] = ()) -> dict[str, str]:
    """Returns, by full name of a Linear of the block, the module that reads its output plus a rest, or "" for the block's
    own output being that sum.

    A probe is added to the Linear's output: a tensor that grows by just the probe is such a sum. Of several the last counts
    (a dropout module reads the output alone, before anything was added). Linears whose output reaches the rest of the block
    in no such way are left out, and those whose output alone is what a module reads, such as a norm of queries.

    Args:
        call: gives the block's output, in float32 or float64 (`ptq.network.precise`).
        block: its weights are in memory.
        hidden: input of the block (1, tokens, channels), in that type.
        norms: names of norms whose own output is added to the stream (`find_norm_sums`): what they read is a sum.
    """
    width, experts = hidden.shape[-1], {name for names in block.experts.values() for name in names}
    found = {n: m for n, m in block.linears.items() if n not in experts and weight_of(m).shape[0] == width}
    return _sums(call, block, hidden, found, norms)


def find_rests(call: Call, block: Block, hidden: torch.Tensor, sums: Mapping[str, str]) -> dict[str, str]:
    """Returns, by full name of a Linear of `sums`, a module that reads the rest: to the last bit the sum is that module's input
    plus the Linear's output. Of several the first that is called, which may be the block itself. Linears whose rest no module
    reads, such as those of an attention and an MLP that are added together, are left out.

    Args:
        call: gives the block's output.
        block: its weights are in memory.
        hidden: input of the block (1, tokens, channels).
        sums: what `find_sums` gives.
    """
    own = _outputs(call, hidden, {name: block.linears[name] for name in sums})
    tensors = _tensors(call, block, hidden, [], None)
    read = {block.name: hidden, **{place: tensor for place, tensor in tensors.items() if place}}
    found: dict[str, str] = {}
    for name, output in own.items():
        total = tensors[sums[name]]
        rest = next((place for place, tensor in read.items() if torch.equal(tensor + output, total)), None)
        if rest is not None:
            found[name] = rest
    return found


def find_weighed_sums(call: Call, block: Block, hidden: torch.Tensor, known: Collection[str]) -> dict[str, str]:
    """Returns the same for Linears whose output is multiplied with a number for each token before it is added: experts, and
    what a gate weighs.

    The probe is one vector for all tokens, so that what it adds up to is a multiple of it, whoever saw which token. What is
    the same in all experts is looked at together.

    Args:
        call: gives the block's output.
        block: its weights are in memory.
        hidden: input of the block (1, tokens, channels).
        known: Linears that are part of a sum as they are.
    """
    width = hidden.shape[-1]
    alike: dict[tuple[str, int], list[str]] = {}
    inside = {name: (expert, i) for expert, names in block.experts.items() for i, name in enumerate(names)}
    for name, module in block.linears.items():
        if name not in known and weight_of(module).shape[0] == width:
            expert, number = inside.get(name, (name, 0))
            alike.setdefault((expert.rpartition(".")[0] if name in inside else name, number), []).append(name)
    if not alike:
        return {}
    before = _tensors(call, block, hidden, [], None)
    own = _outputs(call, hidden, {name: block.linears[name] for names in alike.values() for name in names})
    probe = torch.randn(width, generator=torch.Generator().manual_seed(block.index)).to(hidden)
    probe *= float(before[""].double().std())
    found: dict[str, str] = {}
    for names in alike.values():
        after = _tensors(call, block, hidden, [block.linears[name] for name in names], probe)
        for place, tensor in before.items():
            if names[0] in own and torch.equal(tensor, own[names[0]]):
                continue  # a norm of queries, say
            if place in block.linears:
                continue  # What a Linear reads as it is, such as the values that an attention has weighed, is not the stream.
            if place in after and _grew_along(tensor, after[place], probe):
                found.update(dict.fromkeys(names, place))
    return found


def find_norm_sums(call: Call, block: Block, hidden: torch.Tensor) -> dict[str, str]:
    """Returns the same for the block's norms: those whose own output is added to the residual stream (Gemma's, after the
    attention and the MLP). What a norm hands to its readers alone is no sum.
    """
    norms = {f"{block.name}.{n}": m for n, m in block.module.named_modules() if _is_norm(m, hidden.shape[-1])}
    return _sums(call, block, hidden, norms, ())


def _sums(
    call: Call, block: Block, hidden: torch.Tensor, modules: Mapping[str, nn.Module], alone: Collection[str]
) -> dict[str, str]:
    """`alone`: modules that may read an output with nothing added to it."""
    own = _outputs(call, hidden, modules)
    before = _tensors(call, block, hidden, [], None)
    found: dict[str, str] = {}
    for name, linear in modules.items():
        probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(block.index)).to(hidden)
        probe *= float(before[""].double().std())
        after = _tensors(call, block, hidden, [linear], probe)
        for place, tensor in before.items():
            if place not in alone and name in own and torch.equal(tensor, own[name]):
                continue
            if place in after and _grew_by(tensor, after[place], probe):
                found[name] = place
    return found


def _outputs(call: Call, hidden: torch.Tensor, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Returns what these modules give when the block is called, in the shape of `hidden`, where it has as many numbers."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.numel() == hidden.numel():
                seen[name] = output.reshape(hidden.shape).clone()

        return hook

    with hooked(module.register_forward_hook(keep(name)) for name, module in modules.items()):
        call(hidden)
    return seen


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.shape == (width,) and not any(True for _ in module.children())


def _grew_by(before: torch.Tensor, after: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether `after` is `before` plus `probe` but for rounding, which is relative to the greatest number at hand."""
    error = float((after - before - probe).double().norm() / probe.double().norm())
    rounding = torch.finfo(before.dtype).eps * float(before.double().norm() / probe.double().norm())
    return error <= TOLERANCE + rounding


def _grew_along(before: torch.Tensor, after: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether `after` is `before` plus a multiple of `probe` (channels,) for each token, but for rounding."""
    change = (after - before).double().flatten(0, -2)
    wide = probe.double()
    shares = change @ wide / wide.square().sum()
    norm = float(change.norm())
    error = float((change - shares[:, None] * wide).norm())
    rounding = torch.finfo(before.dtype).eps * float(before.double().norm())
    return norm > 100 * rounding and error <= TOLERANCE * norm + rounding


def _tensors(
    call: Call,
    block: Block,
    hidden: torch.Tensor,
    linears: Sequence[nn.Module],
    probe: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Returns the inputs of the block's modules that have the tokens and channels of `hidden`, in the order of the calls, and
    last the block's output as "". The `probe` is added to the output of `linears`.
    """
    seen: dict[str, torch.Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, torch.Tensor) and x.shape[-1:] == hidden.shape[-1:] and x.numel() == hidden.numel():
                seen.setdefault(f"{block.name}.{name}", x.reshape(hidden.shape).clone())

        return hook

    places = ((name, module) for name, module in block.module.named_modules() if name)
    with hooked(module.register_forward_pre_hook(look(name)) for name, module in places), _added(linears, probe):
        output = call(hidden)
    return {**seen, "": output}


def _added(linears: Sequence[nn.Module], probe: torch.Tensor | None) -> AbstractContextManager[None]:
    def add(module: nn.Module, args: Any, output: torch.Tensor) -> Any:
        return output if probe is None else output + (probe if probe.dim() == 1 else probe.view(output.shape))

    return hooked(linear.register_forward_hook(add) for linear in linears)
