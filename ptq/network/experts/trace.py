"""Which tensors of a block hold a matrix of each expert, found by what the block's own code does with them.

No weight is looked at, so that a model on the meta device shows the same: products are answered with made-up numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptq.network.experts.stand_in import StandIn, Unsupported

TOKENS = 16
"""Tokens that are sent through a mixture to see what it does."""

Place = tuple[str, str]
"""(name of a module inside the block, name of its parameter)."""


@dataclass(frozen=True)
class FusedExperts:
    """A parameter that holds one matrix of each expert.

    Attributes:
        owner: name of the module that holds it, inside the block.
        name: of the parameter.
        shape: (experts, a, b) of the matrices, which the parameter may hold flattened.
        flipped: whether each matrix is (in, out), where Linears have (out, in).
        bias: name of the owner's parameter (experts, out) that is added to the products, or "".
        halves: whether the rows are those of a gate and of what it gates: ``""`` where they are one Linear's,
            ``stacked`` one half after the other, ``interleaved`` in turn.
        gate_first: whether the gate's rows come first, where there are halves.
    """

    owner: str
    name: str
    shape: tuple[int, int, int]
    flipped: bool
    bias: str = ""
    halves: str = ""
    gate_first: bool = True


@dataclass(frozen=True)
class Routing:
    """How a mixture's code hands tokens to its experts: a module is called with (tokens, k) numbers of experts and weights.

    Attributes:
        module: its name inside the block.
        index: position or name of the argument with the numbers, int64 (tokens, k).
        weights: of the one with their weights (tokens, k).
        scores: (name of the module inside the block that gives scores (tokens, experts), number of the item among what it
            gives), or None where no module does.
    """

    module: str
    index: int | str
    weights: int | str
    scores: tuple[str, int] | None = None


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in a block.

    Attributes:
        experts: how many.
        holders: names, inside the block, of modules whose children ``0``, ``1``, ... are experts, once taken apart.
        fused: the parameters that hold them; none where they are modules of Linears anyway.
        gates: names, inside the block, of modules whose ``weight`` (rows, in) chooses among experts, or weighs them.
        routing: how tokens are handed to them, or None where that is not seen.
    """

    experts: int
    holders: tuple[str, ...]
    fused: tuple[FusedExperts, ...] = ()
    gates: tuple[str, ...] = ()
    routing: Routing | None = None


def find_mixtures(block: nn.Module, width: int) -> list[Mixture]:
    """Returns the mixtures of a block.

    The modules above each parameter of two or more dimensions that is no Linear's are called with hidden states, the
    innermost first; that whose code runs and multiplies by slices of them is a mixture. So is a list of modules with
    Linears beside a Linear with as many rows as it is long.

    Args:
        block: a decoder block, on any device, on meta as well.
        width: channels of the hidden states.
    """
    modules = dict(block.named_modules())
    places = [
        (owner, name)
        for owner, module in modules.items()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2 and not isinstance(module, nn.Linear)
    ]
    found = list(_listed(modules))
    done: set[str] = set()
    for owner, name in places:
        parameter = modules[owner]._parameters[name]
        if owner in done or parameter is None or _alone(parameter, modules[owner]):
            continue
        for host in _above(owner):
            with torch.device("cpu"):  # a model is built on meta by making that the default
                mixture = _mixture(modules, host, [p for p in places if _inside(p[0], host)], width)
            if mixture is not None:
                found.append(mixture)
                done |= {p[0] for p in places if _inside(p[0], host)}
                break
    return found


def _listed(modules: Mapping[str, nn.Module]) -> Iterator[Mixture]:
    """Yields the mixtures whose experts are modules in a list."""
    for name, module in modules.items():
        parent, _, _ = name.rpartition(".")
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or not parent:
            continue
        if all(any(isinstance(m, nn.Linear) for m in expert.modules()) for expert in module):
            gates = _narrow_linears(modules, parent, len(module), outside=name)
            if any(modules[gate].out_features == len(module) for gate in gates):
                yield Mixture(len(module), (name,), (), gates)


def _narrow_linears(
    modules: Mapping[str, nn.Module], inside: str, experts: int, outside: str | None = None
) -> tuple[str, ...]:
    """Returns the Linears with as many rows as there are experts, or with one, that are no experts' own."""
    return tuple(
        name
        for name, module in modules.items()
        if _inside(name, inside) and (outside is None or not _inside(name, outside))
        if isinstance(module, nn.Linear) and module.out_features in {1, experts}
    )


def _alone(parameter: torch.Tensor, module: nn.Module) -> bool:
    """Whether the parameter is the only wide one of its module, and a matrix: a router's, not its experts'."""
    wide = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
    return parameter.dim() == 2 and len(wide) == 1


def _above(owner: str) -> Iterator[str]:
    """Yields the module itself, then those around it, without the block."""
    while owner:
        yield owner
        owner = owner.rpartition(".")[0]


def _inside(name: str, host: str) -> bool:
    return name == host or name.startswith(f"{host}.")


@dataclass
class _Product:
    """One product that the code asked for: `y` is the made-up answer."""

    place: Place
    expert: int | None
    flipped: bool
    shape: torch.Size
    x: torch.Tensor
    y: torch.Tensor
    bias: Place | None = None


@dataclass
class _Notes:
    """What a call of a mixture showed."""

    products: list[_Product] = field(default_factory=list)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[tuple[str, Any]] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))


class _Noting(StandIn):
    """Answers with positive made-up numbers that gradients can be asked of, and notes the product."""

    def __init__(self, place: Place, shape: Any, notes: _Notes):
        super().__init__(place, shape, torch.float32, torch.device("cpu"))
        self.notes = notes

    def viewed(self, shape: torch.Size) -> StandIn:
        return _Noting(self.place, shape, self.notes)

    def product(self, x: torch.Tensor, expert: int | None, flipped: bool) -> torch.Tensor:
        inputs, outputs = self.shape[-2:] if flipped else self.shape[:-3:-1]
        if x.shape[-1] != inputs:
            raise Unsupported(self.place, f"multiplied with {x.shape[-1]} channels")
        # Positive, so that a ReLU lets them through; below 1, so that nothing is capped.
        y = torch.rand(*x.shape[:-1], outputs, generator=self.notes.generator) * 0.8 + 0.1
        y.requires_grad_(expert is not None)
        self.notes.products.append(_Product(self.place, expert, flipped, self.shape, x, y))
        return y

    def added(self, y: torch.Tensor, expert: int) -> torch.Tensor:
        product = next((p for p in self.notes.products if p.y is y and p.expert == expert), None)
        if product is None or product.bias not in {None, self.place} or self.shape[-1] != y.shape[-1]:
            raise Unsupported(self.place, "added to what is no product of its expert")
        product.bias = self.place
        return y


def _mixture(modules: Mapping[str, nn.Module], host: str, places: list[Place], width: int) -> Mixture | None:
    """Returns what the module `host` is, or None where it cannot be called with hidden states or holds no experts."""
    standing = list(places)
    while standing:
        try:
            notes = _call(modules, host, standing, width)
        except Unsupported as error:
            if error.place not in standing:
                return None
            standing.remove(error.place)  # type: ignore[arg-type]
            continue
        except Exception:  # the code may be anyone's: what does not run this way is looked at from further out
            return None
        return _described(modules, host, notes)
    return None


def _call(modules: Mapping[str, nn.Module], host: str, standing: list[Place], width: int) -> _Notes:
    """Calls a module with hidden states (1, `TOKENS`, `width`), stand-ins at these places and made-up numbers elsewhere."""
    notes = _Notes()
    hidden = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(1))
    inner = {name: module for name, module in modules.items() if _inside(name, host)}
    with ExitStack() as hooks:
        for name, module in inner.items():
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: notes.calls.append((name, args, kwargs)), with_kwargs=True
            )
            after = module.register_forward_hook(
                lambda _, args, output, name=name: notes.outputs.append((name, output))
            )
            hooks.enter_context(before)
            hooks.enter_context(after)
        with _made_up(inner, standing, notes), torch.enable_grad():
            modules[host](hidden)
    return notes


@contextmanager
def _made_up(modules: Mapping[str, nn.Module], standing: list[Place], notes: _Notes) -> Iterator[None]:
    """Inside, the modules have stand-ins at the places `standing`, and take no memory for their other parameters."""
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in modules.values()]
    try:
        for owner, module in modules.items():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if (owner, name) in standing:
                    module._parameters[name] = _Noting((owner, name), parameter.shape, notes)  # type: ignore[assignment]
                else:
                    module._parameters[name] = _few(parameter)  # type: ignore[assignment]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = _few(buffer) if buffer.is_meta else buffer.cpu()
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


def _few(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of that shape, its rows all the same numbers in memory."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    size = tensor.shape[-1] if tensor.dim() else 1
    values = torch.linspace(0.01, 0.02, size).to(dtype)
    return values.expand(tensor.shape) if tensor.dim() else values[0]


def _described(modules: Mapping[str, nn.Module], host: str, notes: _Notes) -> Mixture | None:
    of_experts = [p for p in notes.products if p.expert is not None and p.x.shape[:-1].numel()]
    fused: list[FusedExperts] = []
    for place in dict.fromkeys(p.place for p in of_experts):
        mine = [p for p in of_experts if p.place == place]
        shapes = {(p.shape, p.flipped, p.bias) for p in mine}
        if len(shapes) != 1 or (mine[0].bias is not None and mine[0].bias[0] != place[0]):
            return None
        experts, rows, columns = mine[0].shape
        halves, gate_first = _halves(mine[0], notes.products)
        bias = "" if mine[0].bias is None else mine[0].bias[1]
        fused.append(FusedExperts(*place, (experts, rows, columns), mine[0].flipped, bias, halves, gate_first))
    counts = {f.shape[0] for f in fused}
    if len(counts) != 1:
        return None
    experts = counts.pop()
    gates = [p.place[0] for p in notes.products if p.expert is None and p.place[1] == "weight"]
    around = host if "." not in host else host.rpartition(".")[0]
    gates += _narrow_linears(modules, around, experts)
    holders = tuple(dict.fromkeys(f.owner for f in fused))
    return Mixture(experts, holders, tuple(fused), tuple(dict.fromkeys(gates)), _routing(host, fused, experts, notes))


def _routing(host: str, fused: list[FusedExperts], experts: int, notes: _Notes) -> Routing | None:
    """Returns how the innermost module that is handed numbers of experts, and weights, is handed them."""
    for name in _above(fused[0].owner):
        for called, args, kwargs in notes.calls:
            items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            index = [
                (at, v) for at, v in items if isinstance(v, torch.Tensor) and v.dtype == torch.int64 and v.dim() == 2
            ]
            if called != name or len(index) != 1:
                continue
            at, numbers = index[0]
            weights = [
                other
                for other, v in items
                if isinstance(v, torch.Tensor) and v.is_floating_point() and v.shape == numbers.shape
            ]
            if len(weights) == 1 and numbers.shape[0] == TOKENS:
                return Routing(name, at, weights[0], _scores(experts, notes))
        if name == host:
            return None
    return None


def _scores(experts: int, notes: _Notes) -> tuple[str, int] | None:
    for name, output in notes.outputs:
        for i, item in enumerate(output if isinstance(output, tuple) else (output,)):
            floating = isinstance(item, torch.Tensor) and item.is_floating_point()
            if floating and item.shape[-1] == experts and item.numel() == TOKENS * experts:
                return name, i
    return None


@torch.enable_grad()
def _halves(product: _Product, products: list[_Product]) -> tuple[str, bool]:
    """Returns `FusedExperts.halves` and `FusedExperts.gate_first` of what made this product, by what the next one of its expert reads.

    Every channel read there depends on one row of either half: gradients of two sums of them tell on which, the second sum
    weighing each channel with its number. What is gated enters linearly: its second derivative is nothing.
    """
    y, experts_own = product.y, [p for p in products if p.expert == product.expert and p.place != product.place]
    following = [p for p in experts_own if 2 * p.x.shape[-1] == y.shape[-1] and p.x.grad_fn is not None]
    following = [p for p in following if p.x.shape[:-1] == y.shape[:-1]]
    if not following:
        return "", True
    z = following[0].x
    channels = torch.arange(1, z.shape[-1] + 1, dtype=torch.float32)
    gradient = torch.autograd.grad(z.sum(), y, create_graph=True, allow_unused=True)[0]
    numbered = torch.autograd.grad((z * channels).sum(), y, retain_graph=True, allow_unused=True)[0]
    if gradient is None or numbered is None:
        return "", True
    places = (numbered / gradient).detach().flatten(0, -2)
    places = torch.where(places.isfinite(), places, 0).amax(0).round().long() - 1
    size = z.shape[-1]
    layouts = {
        "stacked": ((slice(0, size), slice(size, None)), torch.arange(2 * size) % size),
        "interleaved": ((slice(0, None, 2), slice(1, None, 2)), torch.arange(2 * size) // 2),
    }
    for halves, (parts, expected) in layouts.items():
        if torch.equal(places, expected):
            bent = [_bends(gradient, y, part) for part in parts]
            return halves, bent[0] or not bent[1]
    return "", True


def _bends(gradient: torch.Tensor, y: torch.Tensor, part: slice) -> bool:
    """Whether what follows is no linear function of these rows alone."""
    mine = gradient[..., part].sum()
    if mine.grad_fn is None:
        return False
    second = torch.autograd.grad(mine, y, retain_graph=True, allow_unused=True)[0]
    return second is not None and bool((second[..., part].abs() > 1e-6).any())
