"""A loaded model seen as embedding -> blocks -> head."""

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ptq.errors import UserError
from ptq.network.experts.linears import Piece, mixtures_of, pieces_of, take_apart
from ptq.network.experts.routing import attach_routing
from ptq.network.experts.trace import Mixture, find_mixtures
from quantize.kernels.matmul import use_fast_linears
from quantize.modules.packed import PackedLinear


def is_linear(module: nn.Module) -> bool:
    """Returns whether `module` multiplies its input's last dimension by a weight matrix: Linear or GPT-2's Conv1D.

    A `PackedLinear` holds no such matrix.
    """
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and not isinstance(module, PackedLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether `module` is transformers' Conv1D, GPT-2's Linear, which keeps its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D  # transformers takes a second, which finished runs do without

    return isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> torch.Tensor:
    """Returns the weight of a Linear or Conv1D as (out, in)."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    return weight.t() if is_conv1d(module) else weight


@dataclass
class Block:
    """One decoder block.

    Attributes:
        index: its number.
        name: its full module name.
        module: the block.
        linears: its Linear and Conv1D modules by full name, those of its experts too.
        gates: by full name, what chooses among experts or weighs them: modules with a ``weight`` (rows, in) that stays in
            floating point.
        mixtures: its mixtures of experts; names in them are those inside the block.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, nn.Module]
    gates: dict[str, nn.Module] = field(default_factory=dict)
    mixtures: list[Mixture] = field(default_factory=list)

    @property
    def readers(self) -> dict[str, nn.Module]:
        """What multiplies its input by a ``weight`` (rows, in), by full name: gates and Linears."""
        return {**self.gates, **self.linears}

    @property
    def experts(self) -> dict[str, tuple[str, ...]]:
        """Full names of the Linears of each expert, by the expert's full name (of several that it has, the first)."""
        found: dict[str, tuple[str, ...]] = {}
        for mixture in self.mixtures:
            places = {f"{self.name}.{holder}.": holder for holder in mixture.holders}
            for name in self.linears:
                place = next((p for p in places if name.startswith(p)), None)
                if place is not None:
                    number = name.removeprefix(place).split(".")[0]
                    expert = f"{self.name}.{mixture.holders[0]}.{number}"
                    found[expert] = (*found.get(expert, ()), name)
        return found


@dataclass(frozen=True)
class Uncovered:
    """A parameter of two or more dimensions inside the blocks that is no Linear's weight, so nothing here quantizes it."""

    name: str
    parameters: int


@dataclass
class Network:
    """A causal language model as blocks between an embedding and a head.

    `parameters` counts tied ones once, before anything was quantized; `returns_tuple` says what the model expects a block to return; `BlockStream` learns it on the first batch.
    """

    model: Any
    blocks: list[Block]
    parameters: int
    uncovered: list[Uncovered] = field(default_factory=list)
    returns_tuple: bool | None = None
    pieces: dict[str, Piece] = field(default_factory=dict)
    """Where the parameters of experts' Linears lie in the tensors that the model held, by full name."""

    @property
    def outside(self) -> list[str]:
        """Names of the modules outside the blocks that hold parameters or buffers: embedding, final norm, head, ..."""
        names = {block.name for block in self.blocks}
        return [name for name in _leaves(self.model) if not any(name == b or name.startswith(f"{b}.") for b in names)]

    @cached_property
    def linears(self) -> dict[str, nn.Module]:
        """Every Linear of every block by full name."""
        return {name: module for block in self.blocks for name, module in block.linears.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every Linear of every block by full name."""
        shapes = {name: weight_of(module).shape for name, module in self.linears.items()}
        return {name: (rows, columns) for name, (rows, columns) in shapes.items()}

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model embeds."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """Longest window that the model has positions for, None where it has no limit (ALiBi)."""
        config = self.model.config
        for key in ("max_position_embeddings", "n_positions"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0 and not getattr(config, "alibi", False):
                return value
        return None

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        config = self.model.config.get_text_config()
        given = getattr(config, "head_dim", None)
        return int(given) if given else int(config.hidden_size // config.num_attention_heads)

    def coverage(self) -> str | None:
        """Returns a sentence that names the parameters inside the blocks that no Linear holds, or None."""
        if not self.uncovered:
            return None
        share = sum(u.parameters for u in self.uncovered) / self.parameters
        kinds = sorted({".".join(p for p in u.name.split(".") if not p.isdigit()) for u in self.uncovered})
        return f"not covered: {', '.join(kinds)} ({share:.1%} of the parameters) hold no Linear and stay as they are"


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks of `model` by full name: the ModuleList that holds the most parameters.

    Raises:
        UserError: when no list of blocks is found.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    lists = [(name, m) for name, m in lists if any(is_linear(x) for x in m.modules())]
    if not lists:
        raise UserError(
            f"model.path: {type(model).__name__} holds no list of blocks with Linears: not a decoder-only Transformer"
        )
    name, modules = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{i}": module for i, module in enumerate(modules)}


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside the context no cycles are looked for: of a hundred thousand modules that stay, in vain, a quarter of their making."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@uncollected()
def build_network(model: nn.Module) -> Network:
    """Finds the blocks of `model`: the ModuleList that holds the most parameters. Needs no weights (meta works).

    The model's `nn.Linear` become `quantize.kernels.matmul.Linear`, which differ from them only inside `fast_linears`. Experts
    that are held in one tensor become Linears (`ptq.network.experts`), for good.

    Raises:
        UserError: when no list of blocks is found.
    """
    modules = blocks_of(model)
    take_experts_apart(model, modules)
    pieces = {name: piece for module in modules.values() for name, piece in pieces_of(module).items()}
    blocks = [_block(i, name, module) for i, (name, module) in enumerate(modules.items())]
    uncovered = [u for block in blocks for u in _uncovered(block)]
    use_fast_linears(model)
    return Network(model, blocks, sum(p.numel() for p in model.parameters()), uncovered, pieces=pieces)


def take_experts_apart(model: Any, blocks: dict[str, nn.Module]) -> None:
    """Makes Linears of all experts. Blocks that hold the same modules and shapes are looked at once."""
    known: dict[tuple[object, ...], list[Mixture]] = {}
    for name, block in blocks.items():
        wide = tuple((n, tuple(p.shape)) for n, p in block.named_parameters() if p.dim() >= 2)
        key = (type(block), wide)
        if key not in known:
            if not known and hasattr(model, "set_experts_implementation"):
                # The model's own code, which takes one expert's matrix after another.
                model.set_experts_implementation("eager")
            known[key] = find_mixtures(block, int(model.config.get_text_config().hidden_size))
        for mixture in known[key]:
            take_apart(block, name, mixture)
            attach_routing(block, mixture)


def _block(index: int, name: str, module: nn.Module) -> Block:
    mixtures = mixtures_of(module)
    gates = {f"{name}.{gate}": module.get_submodule(gate) for mixture in mixtures for gate in mixture.gates}
    linears = {f"{name}.{n}": m for n, m in module.named_modules() if is_linear(m) and f"{name}.{n}" not in gates}
    return Block(index, name, module, linears, gates, mixtures)


def _uncovered(block: Block) -> Iterator[Uncovered]:
    held = {id(m.weight) for m in (*block.linears.values(), *block.gates.values())}
    for name, parameter in block.module.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in held:
            yield Uncovered(f"{block.name}.{name}", parameter.numel())


def _leaves(model: nn.Module) -> list[str]:
    def own(module: nn.Module) -> bool:
        return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))

    return [name for name, module in model.named_modules() if own(module)]


@contextmanager
def replaced_forward(modules: list[nn.Module], forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Inside the context `modules[i]` runs ``forward(i)`` instead of its own forward."""
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.callback(_restore, module, module.__dict__.get("forward"))
            module.__dict__["forward"] = forward(i)
        yield


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def first_tensor(output: Any) -> torch.Tensor:
    """Returns the hidden states out of what a block returned: the tensor itself, or a tuple's first item."""
    return output if isinstance(output, torch.Tensor) else output[0]


def module_of(model: nn.Module, name: str) -> nn.Module:
    """Returns the submodule `name`."""
    return model.get_submodule(name)


def is_inside(owner: str, names: Collection[str]) -> bool:
    """Whether a module of that full name lies inside one of the modules `names`."""
    parts = owner.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
