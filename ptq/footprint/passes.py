"""A forward pass on the meta device: FLOPs by part and the KV cache's shape, from a model that has no weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptq.network.network import Block, Network, is_linear, replaced_forward, weight_of
from ptq.network.skeleton import NotTraceable, without_values

SHORT = 16
"""Tokens of the first of two passes that tell attention by its growth; the second has twice as many."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass; a multiplication with its addition counts as two.

    Only matrix products are counted: norms, activation functions, softmax and rotary embeddings are not.

    Attributes:
        attention: Linears of the attention.
        products: query with key, probabilities with value: the part that grows with the context. The full square is
            counted in a prefill; a kernel that skips what a causal mask hides does about half of it.
        mlp: everything else inside the blocks; of a mixture of experts, those that a token is sent to.
        head: the output projection, for every token.
        other: the rest, such as projections between an embedding and the blocks.
    """

    attention: int
    products: int
    mlp: int
    head: int
    other: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.attention + self.products + self.mlp + self.head + self.other


@dataclass(frozen=True)
class CacheLayer:
    """One layer of the KV cache: `attention` is the full name of the module that fills it.

    `keys` and `values` are (heads, tokens, channels) after a prefill; `tokens` is less than was prefilled where attention
    has a window.
    """

    attention: str
    keys: tuple[int, int, int]
    values: tuple[int, int, int]


@dataclass(frozen=True)
class Pass:
    """What a network does with a text of `context` tokens.

    Attributes:
        context: tokens of the prefill.
        attentions: full names of the modules that multiply tokens with tokens.
        interfaced: how many of them call transformers' attention interface.
        prefill: FLOPs of all `context` tokens at once.
        decode: FLOPs of one more token, after them, with their keys and values in the cache.
        cache: the KV cache after the prefill.
    """

    context: int
    attentions: tuple[str, ...]
    interfaced: int
    prefill: Flops
    decode: Flops
    cache: tuple[CacheLayer, ...]


def trace_shapes(network: Network, context: int) -> Pass:
    """Runs a network that is on the meta device on `context` tokens and one more, and counts.

    Attention is found by what it does, not by its name: it is the innermost module of a block whose products grow faster
    than the number of tokens.

    Raises:
        NotTraceable: when the forward pass does not run without values, or hands no KV cache back.
    """
    seen: set[nn.Module] = set()
    with without_values(network, seen):
        try:
            short, _ = _count(network.model, SHORT)
            double, _ = _count(network.model, 2 * SHORT)
            prefill, cache = _count(network.model, context)
            layers = _layers(cache)  # before the next token enters the cache
            decode, _ = _count(network.model, 1, cache)
        except Exception as error:  # remote code may raise anything; the caller says that nothing was counted
            raise NotTraceable.because(error) from error
    attentions = _attentions(network, short, double)
    return Pass(
        context,
        attentions,
        len(seen),
        _by_part(network, attentions, prefill),
        _by_part(network, attentions, decode),
        tuple(CacheLayer(_owner(network, attentions, index), keys, values) for index, keys, values in layers),
    )


@dataclass(frozen=True)
class BlockFlops:
    """FLOPs of one window, by full name of a block, and of the head; and how many experts a token is sent to in a block."""

    blocks: dict[str, int]
    head: int
    chosen: dict[str, float]


def block_flops(network: Network, tokens: int) -> BlockFlops:
    """Returns the FLOPs of one window of so many tokens.

    Blocks whose Linears have the same names and shapes are alike: one of them is run, the others are stepped over.

    Raises:
        NotTraceable: when the forward pass does not run without values.
    """
    first: dict[int, Block] = {}
    alike: dict[str, Block] = {}
    for block in network.blocks:
        shapes = ((name.removeprefix(block.name), tuple(m.weight.shape)) for name, m in block.readers.items())  # type: ignore[union-attr, operator, arg-type]
        alike[block.name] = first.setdefault(hash(tuple(shapes)), block)
    stepped = [block.module for block in network.blocks if alike[block.name] is not block]

    def step_over(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, None) if network.returns_tuple else hidden

        return forward

    with without_values(network, set()), replaced_forward(stepped, step_over):
        try:
            counts, _ = _count(network.model, tokens, use_cache=False)
        except Exception as error:  # remote code may raise anything
            raise NotTraceable.because(error) from error
    found = {name: counts.get(block.name, 0) for name, block in alike.items()}
    chosen = {block.name: _chosen(block, counts, tokens) for block in first.values()}
    by_name = {name: chosen[block.name] for name, block in alike.items()}
    return BlockFlops(found, counts.get(head_name(network) or "none", 0), by_name)


def _chosen(block: Block, counts: dict[str, int], tokens: int) -> float:
    """Returns how many experts a token is sent to: the first stands for all of them in a pass without values."""
    name = next((names[0] for names in block.experts.values()), None)
    return 0.0 if name is None else counts.get(name, 0) / (2 * weight_of(block.linears[name]).numel() * tokens)


def attentions_by_structure(network: Network) -> tuple[str, ...]:
    """Returns the attentions of a network that cannot be traced: the innermost modules inside the blocks that hold Linears
    and know their layer's index, as transformers' modules that fill a KV cache do.
    """
    names = [
        f"{block.name}.{name}"
        for block in network.blocks
        for name, module in block.module.named_modules()
        if name and hasattr(module, "layer_idx") and any(is_linear(m) for m in module.modules())
    ]
    return tuple(name for name in names if not any(other.startswith(f"{name}.") for other in names))


def _count(model: Any, tokens: int, cache: Any = None, use_cache: bool = True) -> tuple[dict[str, int], Any]:
    """Returns the FLOPs by full module name ("" is the model) of a pass over `tokens` tokens, and the cache."""
    options = {} if cache is None else {"past_key_values": cache}
    before = 0 if cache is None else cache.get_seq_length()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Without a mask some models look for padding among the tokens, and these have no values.
    mask = torch.ones(1, before + tokens, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, attention_mask=mask, use_cache=use_cache, **options)
    counts: dict[str, int] = {"": counter.get_total_flops()}
    for name, operations in counter.get_flop_counts().items():
        root, _, inner = name.partition(".")
        if inner and root == type(model).__name__:
            counts[inner] = sum(operations.values())
    return counts, output.past_key_values if use_cache else None


def _layers(cache: Any) -> list[tuple[int, tuple[int, int, int], tuple[int, int, int]]]:
    """Returns (layer index, shape of the keys, shape of the values) of every layer that keeps keys, without the batch."""
    held = [(i, layer.keys, layer.values) for i, layer in enumerate(cache.layers) if hasattr(layer, "keys")]
    return [
        (i, (keys.shape[1], keys.shape[2], keys.shape[3]), (values.shape[1], values.shape[2], values.shape[3]))
        for i, keys, values in held
        if keys is not None
    ]


def _attentions(network: Network, short: dict[str, int], double: dict[str, int]) -> tuple[str, ...]:
    inside = tuple(f"{block.name}." for block in network.blocks)
    growing = [n for n in short if n.startswith(inside) and double[n] > 2 * short[n]]
    return tuple(name for name in growing if not any(other.startswith(f"{name}.") for other in growing))


def _owner(network: Network, attentions: tuple[str, ...], index: int) -> str:
    block = network.blocks[index].name
    return next((name for name in attentions if name.startswith(f"{block}.")), block)


def _by_part(network: Network, attentions: tuple[str, ...], counts: dict[str, int]) -> Flops:
    blocks = sum(counts.get(block.name, 0) for block in network.blocks)
    whole = sum(counts.get(name, 0) for name in attentions)
    inside = tuple(f"{name}." for name in attentions)
    linears = sum(counts.get(name, 0) for name in network.linears if name.startswith(inside))
    head = counts.get(head_name(network) or "none", 0)
    return Flops(linears, whole - linears, blocks - whole, head, counts[""] - blocks - head)


def head_name(network: Network) -> str | None:
    """Returns the full name of the output projection, or None where the model names none."""
    head = network.model.get_output_embeddings()
    return next((name for name, module in network.model.named_modules() if module is head), None)
