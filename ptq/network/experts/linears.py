"""A fused tensor's experts as Linears, and what the module that held it finds in its place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ptq.network.experts.stand_in import StandIn
from ptq.network.experts.trace import FusedExperts, Mixture

Rows = tuple[int | None, int | None, int | None]
"""Start, end and step of a slice."""
WHOLE: Rows = (None, None, None)


@dataclass(frozen=True)
class Piece:
    """Where a parameter of an expert's Linear lies in the fused tensor that a checkpoint holds.

    Attributes:
        source: full name of the fused parameter.
        shape: of it, with its experts first: (experts, a, b) or (experts, out).
        expert: which one's.
        flipped: whether the matrix is (in, out) there.
        rows: of the matrix as (out, in), or of the bias.
    """

    source: str
    shape: tuple[int, ...]
    expert: int
    flipped: bool = False
    rows: Rows = WHOLE

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the piece of one expert's matrix (a, b), or bias (out,): a view."""
        return (tensor.t() if self.flipped else tensor)[slice(*self.rows)]


class Expert(nn.Module):
    """One expert: its Linears, called by the code of the module around it."""


class ExpertLinears(StandIn):
    """Stands for a fused tensor, or its biases, in a module's code: a product calls the Linears that stand in the expert's place now.

    Args:
        owner: the module that held the tensor.
        fused: which one.
        parts: names of the Linears, inside the expert, whose outputs make up a product; "" for the expert being the Linear.
    """

    def __init__(
        self, owner: nn.Module, fused: FusedExperts, parts: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype
    ):
        super().__init__(f"{fused.owner}.{fused.name}", shape, dtype, torch.device("meta"))
        self.owner, self.fused, self.parts = owner, fused, parts

    @property
    def device(self) -> torch.device:
        """Of the experts' weights."""
        return next(self.owner.parameters()).device

    def viewed(self, shape: torch.Size) -> StandIn:
        return ExpertLinears(self.owner, self.fused, self.parts, tuple(shape), self.dtype)

    def linears(self, expert: int) -> Iterator[nn.Module]:
        """Yields what multiplies for this expert, as it stands when its turn comes: a solver may replace it between two."""
        for part in self.parts:
            held = self.owner.get_submodule(str(expert))
            yield held.get_submodule(part) if part else held

    def product(self, x: torch.Tensor, expert: int | None, flipped: bool) -> torch.Tensor:
        outputs = [linear(x) for linear in self.linears(int(expert or 0))]
        if len(outputs) == 1:
            return outputs[0]  # type: ignore[no-any-return]
        if self.fused.halves == "stacked":
            return torch.cat(outputs, -1)
        return torch.stack(outputs, -1).flatten(-2)

    def added(self, y: torch.Tensor, expert: int) -> torch.Tensor:
        return y  # the Linear has added it


def take_apart(block: nn.Module, prefix: str, mixture: Mixture) -> dict[str, Piece]:
    """Puts Linears in the place of a mixture's fused parameters, on their device. Returns where each parameter comes from.

    The Linears' weights are the fused ones' numbers, in memory of their own; one fused tensor is freed before the next is
    taken apart. What they are called: ``<owner>.<expert>.<parameter>``, with ``gate_proj`` and ``up_proj`` for halves.

    Args:
        block: the block.
        prefix: its full name.
        mixture: found in it.
    """
    pieces: dict[str, Piece] = {}
    for fused in mixture.fused:
        pieces |= _take_apart(block.get_submodule(fused.owner), f"{prefix}.{fused.owner}", fused)
    for holder in mixture.holders:
        block.get_submodule(holder).__dict__["ptq_mixture"] = mixture
    if pieces:
        block.get_submodule(mixture.holders[0]).__dict__["ptq_pieces"] = pieces
    return pieces


def pieces_of(block: nn.Module) -> dict[str, Piece]:
    """Returns what `take_apart` returned for the mixtures of a block."""
    held = (module.__dict__.get("ptq_pieces", {}) for module in block.modules())
    return {name: piece for pieces in held for name, piece in pieces.items()}


def mixtures_of(block: nn.Module) -> list[Mixture]:
    """Returns the mixtures of a block that have been taken apart."""
    found = (module.__dict__.get("ptq_mixture") for module in block.modules())
    return list(dict.fromkeys(m for m in found if isinstance(m, Mixture)))


def _take_apart(owner: nn.Module, full: str, fused: FusedExperts) -> dict[str, Piece]:
    weight: torch.Tensor = owner._parameters.pop(fused.name)  # type: ignore[assignment]
    bias = owner._parameters.pop(fused.bias) if fused.bias else None
    parts = part_names(fused)
    pieces: dict[str, Piece] = {}
    with torch.no_grad():
        matrices = _each(weight.view(fused.shape))
        biases = [] if bias is None else _each(bias)
        expert_module, plain = Expert(), nn.Linear(1, 1)
        for expert in range(fused.shape[0]):
            held = owner._modules.get(str(expert))
            if held is None and parts[0][0]:
                owner._modules[str(expert)] = held = _another(expert_module)
            for part, rows in parts:
                of = {"weight": Piece(f"{full}.{fused.name}", fused.shape, expert, fused.flipped, rows)}
                tensors = {"weight": of["weight"].of(matrices[expert])}
                if bias is not None:
                    of["bias"] = Piece(f"{full}.{fused.bias}", tuple(bias.shape), expert, False, rows)
                    tensors["bias"] = of["bias"].of(biases[expert])
                linear = _linear(plain, tensors, weight.requires_grad)
                (owner if held is None or not part else held)._modules[part or str(expert)] = linear
                name = ".".join(p for p in (full, str(expert), part) if p)
                pieces |= {f"{name}.{kind}": piece for kind, piece in of.items()}
    names = tuple(part for part, _ in parts)
    owner.__dict__[fused.name] = ExpertLinears(owner, fused, names, tuple(weight.shape), weight.dtype)
    if bias is not None:
        owner.__dict__[fused.bias] = ExpertLinears(owner, fused, names, tuple(bias.shape), bias.dtype)
    return pieces


def _each(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns the tensors along the first dimension. On meta they are one: a mixture may have thousands, all alike."""
    return (
        [torch.empty(tensor.shape[1:], dtype=tensor.dtype, device="meta")] * len(tensor)
        if tensor.is_meta
        else tensor.unbind()
    )


def part_names(fused: FusedExperts) -> list[tuple[str, Rows]]:
    """Returns the names of the Linears of a fused parameter inside an expert, and their rows.

    The parameter's own name; without the other's where it names both halves (``gate_up_proj``); none where it is plain
    ``weight``, whose owner is named for it.
    """
    if not fused.halves:
        return [("" if fused.name == "weight" else fused.name, WHOLE)]
    words = fused.name.split("_")
    both = {"gate", "up"} <= set(words)
    names = {
        half: "_".join(w for w in words if w != other) if both else f"{half}_proj"
        for half, other in (("gate", "up"), ("up", "gate"))
    }
    rows = fused.shape[2 if fused.flipped else 1] // 2
    slices: dict[str, tuple[Rows, Rows]] = {
        "stacked": ((0, rows, None), (rows, None, None)),
        "interleaved": ((0, None, 2), (1, None, 2)),
    }
    order = ("gate", "up") if fused.gate_first else ("up", "gate")
    return [(names[half], where) for half, where in zip(order, slices[fused.halves], strict=True)]


def _another(module: nn.Module) -> nn.Module:
    """Returns a module like this one, which holds nothing yet: a tenth of the time of making one, ten thousands of times.

    What is empty is made, since it costs a tenth of a copy.
    """
    made = type(module).__new__(type(module))
    made.__dict__.update(
        {k: (v.copy() if v else type(v)()) if isinstance(v, dict | set) else v for k, v in module.__dict__.items()}
    )
    return made


def _linear(plain: nn.Linear, tensors: dict[str, torch.Tensor], requires_grad: bool) -> nn.Module:
    """Returns a Linear of these tensors' numbers."""
    linear = _another(plain)
    rows, columns = tensors["weight"].shape
    linear.__dict__.update(out_features=rows, in_features=columns)  # not by Module's `__setattr__`, which is dear
    for name in ("weight", "bias"):
        value = tensors.get(name)
        if value is not None and not value.is_meta:
            value = value.clone(memory_format=torch.contiguous_format)
        linear._parameters[name] = None if value is None else nn.Parameter(value, requires_grad)
    return linear
