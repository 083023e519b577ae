"""What one call of a block showed: who returned what, and what its Linears and gates read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptq.network.network import Block, is_linear
from ptq.network.precise import Call
from ptq.network.replaced import hooked

COLLINEAR = 1e-9
"""By how much the cosine of two rows in float32 that are multiples of one another may miss 1."""


@dataclass
class Seen:
    """One call of a block.

    Attributes:
        producers: full name of the module that returned it, by id of a tensor.
        fed: id of what it reads, by full name of a module.
        inputs: what it reads, by full name of a Linear, in the order of the calls.
        gate_inputs: the same of the gates.
        norms: what norms returned, by full name.
        keep: keeps ids unique.
    """

    producers: dict[int, str] = field(default_factory=dict)
    fed: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gate_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    keep: list[Any] = field(default_factory=list)

    def giver_of(self, tensor: torch.Tensor) -> str:
        """Returns the last norm whose output has every token of `tensor` (..., channels), times a number of its own, or ""."""
        rows = tensor.flatten(0, -2)
        for name, output in reversed(self.norms.items()):
            given = output.flatten(0, -2)
            if given.shape[1:] != rows.shape[1:] or not len(rows):
                continue
            if given.shape == rows.shape and torch.equal(given, rows):
                return name
            if _multiples(rows.double(), given.double()):
                return name
        return ""


def _multiples(rows: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether every row is a multiple of a given one, and not all are nothing."""
    sizes = rows.norm(dim=1)
    rows = rows[sizes > 0] / sizes[sizes > 0, None]
    given = given / given.norm(dim=1, keepdim=True).clamp_min(torch.finfo(given.dtype).tiny)
    return len(rows) > 0 and bool(((rows @ given.t()).abs().amax(1) > 1 - COLLINEAR).all())


@torch.no_grad()
def record_block(block: Block, call: Call, hidden: torch.Tensor) -> Seen:
    """Calls the block once for `hidden` (1, tokens, channels), and returns what that showed."""
    seen = Seen()
    names = {module: f"{block.name}.{name}" for name, module in block.module.named_modules() if name}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.keep.append((args, output))
        name = names[module]
        if args:
            seen.fed[name] = id(args[0])
            if name in block.gates:
                seen.gate_inputs[name] = args[0]
            elif is_linear(module):
                seen.inputs[name] = args[0]
        if isinstance(output, torch.Tensor) and not any(output is a for a in args):
            seen.producers.setdefault(id(output), name)
            if _is_norm(module):
                seen.norms[name] = output

    # Containers return what their last child returned; `setdefault` keeps the child, whose hook runs first.
    with hooked(module.register_forward_hook(hook) for module in names):
        call(hidden)
    return seen


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and not any(True for _ in module.children())
