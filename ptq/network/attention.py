"""What an attention multiplies, quantized: query, key, value after rotary embeddings, and the probabilities; and what a
cache would hold of keys and values, as each query finds it.

It enters through transformers' own extension point, the attention interface: a model that calls it is covered, whatever
its architecture. A model with an attention of its own (BLOOM, Falcon) is not.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from ptq.config.cache import CacheConfig
from ptq.errors import UserError
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import Block, Network
from quantize.modules.cache import Band, Between, CacheFormat, as_they_are
from quantize.modules.simulated import InputQuantizer
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.rotary import Rotary

NAME = "ptq_simulated"
CHILD = "attention_quantizers"
PREFIX = "attention_prefix"
TENSORS = ("query", "key", "value")
POSITIONS = "position_embeddings"
"""The argument by which transformers gives an attention its cosines and sines."""
SCORES = 1 << 24
"""Scores that exist at once where an attention forms them: queries pass in parts, whatever the window (64 MiB in fp32)."""


@dataclass(frozen=True)
class CacheFormats:
    """How an attention's cache holds its keys and its values; None leaves them exact. With `rotary`, a layout of
    `quantize.transforms.rotary.LAYOUTS`, keys that are rounded are held without their rotary embeddings.
    """

    key: CacheFormat | None = None
    value: CacheFormat | None = None
    rotary: str | None = None

    def of(self, tensor: str) -> CacheFormat | None:
        """Returns the format of ``key`` or ``value``."""
        return self.key if tensor == "key" else self.value

    def items(self) -> Iterator[tuple[str, CacheFormat]]:
        """Yields (``key`` or ``value``, format) of those that are rounded."""
        yield from ((tensor, form) for tensor, form in (("key", self.key), ("value", self.value)) if form is not None)


def cache_format(cache: CacheConfig, spec: QuantSpec, head_dim: int) -> CacheFormat:
    """Returns how a cache holds keys or values of the format `spec`, in heads of `head_dim` channels."""
    by_channel = spec.granularity == "channel"
    group = cache.tokens if by_channel else spec.group_size
    along: Literal["channels", "tokens"] = "tokens" if by_channel else "channels"
    return CacheFormat(spec.bits, group or head_dim, along, cache.window, cache.first, spec.range == "mse")


@dataclass(frozen=True)
class Settled:
    """What a real cache says of the states that it has just given: how many of the first are as it holds them, and the
    rotary embeddings of all of them.
    """

    tokens: Mapping[str, int]
    rotary: Rotary | None = None


class AttentionQuantizers(nn.Module):
    """Quantizers by tensor (``query``, ``key``, ``value``, ``attention_probs``), a child of the attention that they serve.

    `transforms` act on query and key, (batch, heads, tokens, head_dim), before they are quantized. With `cache` keys and
    values are as a cache gives them to each query. While `watch` is set, it is called with (tensor, values (batch, tokens,
    heads * head_dim)) and nothing is quantized.

    `tables` are the cosines and sines of the present call, where the cache asks for them. `settled` is set by a real cache
    right before the attention multiplies what it has given, transforms done, and is taken there.
    """

    def __init__(
        self,
        quantizers: dict[str, InputQuantizer],
        transforms: dict[str, nn.Module] | None = None,
        cache: CacheFormats | None = None,
    ):
        super().__init__()
        self.quantizers = nn.ModuleDict(quantizers)
        self.transforms = nn.ModuleDict(transforms or {})
        self.cache = cache
        self.watch: Callable[[str, torch.Tensor], None] | None = None
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self.settled: Settled | None = None

    def quantize(self, tensor: str, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` (batch, heads, tokens, head_dim) rounded: dynamic ranges are those of a token in a head (or of a
        group in it), static ones those of channels over all heads.
        """
        x = self.transformed(tensor, x)
        if self.watch is not None:
            self.watch(tensor, x.transpose(1, 2).flatten(2))
            return x
        if tensor not in self.quantizers:
            return x
        quantizer = self.quantizers[tensor]
        spec = quantizer.spec
        if spec.dynamic or spec.granularity == "tensor":  # type: ignore[union-attr]
            done: torch.Tensor = quantizer(x)
            return done
        flat: torch.Tensor = quantizer(x.transpose(1, 2).flatten(2))
        return flat.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    def transformed(self, tensor: str, x: torch.Tensor) -> torch.Tensor:
        """Returns what the transform of `tensor` makes of `x`."""
        return self.transforms[tensor](x) if tensor in self.transforms else x

    def bands(self, key: torch.Tensor, value: torch.Tensor, queries: int) -> tuple[Band, Band]:
        """Returns keys and values (batch, kv heads, tokens, head_dim) as the last `queries` of their tokens find them."""
        settled, self.settled = self.settled, None
        rotary = self.rotary() if settled is None else settled.rotary
        found = []
        for tensor, x in (("key", key), ("value", value)):
            done = 0 if settled is None else settled.tokens[tensor]
            x = self.quantize(tensor, x) if settled is None else x
            form = None if self.cache is None or self.watch is not None else self.cache.of(tensor)
            between = self.between(tensor, rotary)
            found.append(Band(x, x) if form is None else Band.of(x, form, queries, done, *between))
        return found[0], found[1]

    def rotary(self) -> Rotary | None:
        """Returns the rotary embeddings of the tokens of the present call, where keys are held without."""
        if self.cache is None or self.cache.rotary is None:
            return None
        if self.tables is None:
            raise UserError("scheme.cache.before_rope: true, but an attention was called without rotary embeddings")
        return Rotary(*self.tables, self.cache.rotary)

    def between(self, tensor: str, rotary: Rotary | None) -> tuple[Between, Between]:
        """Returns the ways from what is multiplied to what is held of it, and back."""
        return (rotary.undo, rotary.do) if tensor == "key" and rotary is not None else (as_they_are, as_they_are)


class Prefix(nn.Module):
    """Keys and values (1, kv heads, tokens, head_dim) that every query of an attention meets before all others: they are of no
    sequence, in no cache, and not quantized.
    """

    key: torch.Tensor
    value: torch.Tensor

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.register_buffer("key", key)
        self.register_buffer("value", value)


def attach_quantizers(attention: nn.Module, quantizers: AttentionQuantizers) -> None:
    """Makes `quantizers` the child of `attention`, which shows them its rotary embeddings where they ask for them."""
    setattr(attention, CHILD, quantizers)
    if quantizers.cache is not None and quantizers.cache.rotary is not None:
        show_tables(attention)


def show_tables(attention: nn.Module) -> None:
    """Lets `attention` show its quantizers, whichever these are, the cosines and sines of every call."""
    if _show in attention._forward_pre_hooks.values():
        return
    attention.register_forward_pre_hook(_show, with_kwargs=True)


def _show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    quantizers = getattr(module, CHILD, None)
    if isinstance(quantizers, AttentionQuantizers):
        quantizers.tables = _tables_of(module, args, kwargs)


def _tables_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the cosines and sines (1 or batch, tokens, channels) that an attention is called with, or None."""
    given = kwargs.get(POSITIONS)
    if given is None and POSITIONS in (known := inspect.signature(module.forward).parameters):
        place = list(known).index(POSITIONS)
        given = args[place] if place < len(args) else None
    if not isinstance(given, tuple) or len(given) != 2:
        return None
    return given


def simulated_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of transformers' interface with the quantizers of `module`, if it has any.

    Query (batch, heads, tokens, head_dim), key and value (batch, kv heads, tokens, head_dim); returns
    (batch, tokens, heads, head_dim). Where scores have to be formed, at most about `SCORES` of them exist at once.
    """
    if s_aux is not None:
        raise UserError(
            "scheme: an attention with sinks cannot be simulated: leave query, key, value and attention_probs null"
        )
    quantizers = getattr(module, CHILD, None)
    keys, values = Band(key, key), Band(value, value)
    if quantizers is not None:
        query = quantizers.quantize("query", query)
        keys, values = quantizers.bands(key, value, query.shape[2])
    prefix, before = getattr(module, PREFIX, None), 0
    if prefix is not None:
        keys, values, before = keys.after(prefix.key), values.after(prefix.value), prefix.key.shape[2]
    repeat = query.shape[1] // key.shape[1]
    keys, values = keys.repeated(repeat), values.repeated(repeat)
    mask = _Mask(attention_mask, query.shape[2], before + key.shape[2], getattr(module, "is_causal", True)).behind(
        before
    )
    inner = {} if quantizers is None else dict(quantizers.quantizers.items())
    probabilities = inner.get("attention_probs")
    plain = softcap is None and probabilities is None and not (before and mask.causal)
    if plain and keys.settled is None and values.settled is None:
        y = functional.scaled_dot_product_attention(
            query, keys.exact, values.exact, mask.given, is_causal=mask.causal, scale=scaling
        )
        return y.transpose(1, 2).contiguous(), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    size = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], size):
        rows = slice(start, min(start + size, query.shape[2]))
        scores = keys.scores(query[:, :, rows], rows) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        p = mask.on(scores, rows).softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
        parts.append(values.mixed(p if probabilities is None else probabilities(p), rows))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Mask:
    """The mask that transformers gives: bool, added, or None for a causal one that need not be formed."""

    given: torch.Tensor | None
    queries: int
    tokens: int
    by_order: bool

    def behind(self, before: int) -> "_Mask":
        """Returns the mask with `before` keys of `tokens` at the beginning that every query sees."""
        if self.given is None or not before:
            return self
        value = True if self.given.dtype == torch.bool else 0.0
        return dataclasses.replace(self, given=functional.pad(self.given, (before, 0), value=value))

    @property
    def causal(self) -> bool:
        """Whether a query may not see what comes after it, and no mask says so."""
        return self.given is None and self.queries > 1 and self.by_order

    def on(self, scores: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns the scores (batch, heads, rows, tokens) of the queries `rows`, with what they may not see out of reach."""
        if self.given is not None and self.given.dtype != torch.bool:
            return scores + self.given[:, :, rows]
        if self.given is not None:
            seen = self.given[:, :, rows]
        elif self.causal:
            positions = torch.arange(rows.start, rows.stop, device=scores.device) + self.tokens - self.queries
            seen = torch.arange(self.tokens, device=scores.device) <= positions[:, None]
        else:
            return scores
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


@contextmanager
def unquantized_attention(block: Block) -> Iterator[None]:
    """Inside the context the block's attentions multiply what is not quantized; their transforms still act."""
    quantized = [(m, m.quantizers, m.cache) for m in block.module.modules() if isinstance(m, AttentionQuantizers)]
    for module, _, _ in quantized:
        module.quantizers, module.cache = nn.ModuleDict(), None
    try:
        yield
    finally:
        for module, quantizers, cache in quantized:
            module.quantizers, module.cache = quantizers, cache


def use_simulated_attention(network: Network) -> None:
    """Lets the model call `simulated_attention` from now on."""
    use_attention(network.model, NAME, simulated_attention)


def use_attention(model: Any, name: str, attention: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """Lets a model of transformers call `attention` from now on, registered as `name`, with the masks of transformers' usual one."""
    # Not when this module is imported: transformers reads its models' code then, for seconds, which finished runs do without.
    import transformers

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation(name)


@contextmanager
def attention_kept(network: Network) -> Iterator[None]:
    """Behind the context the model calls the attention that it called before, whatever it was given inside."""
    before = network.model.config._attn_implementation
    try:
        yield
    finally:
        network.model.set_attn_implementation(before)


@contextmanager
def attention_named(network: Network, name: str) -> Iterator[None]:
    """Inside the context the model calls the attention of this name, of transformers' interface."""
    with attention_kept(network):
        network.model.set_attn_implementation(name)
        yield


def attentions_of(network: Network, stream: BlockStream) -> dict[int, list[str]]:
    """Returns the full names of the modules that call the attention interface, by block, seen in one tiny forward pass."""
    found: dict[int, list[str]] = {block.index: [] for block in network.blocks}
    seers = []
    with attention_kept(network):
        use_simulated_attention(network)
        try:
            for block in network.blocks:
                for name, module in block.module.named_modules(prefix=block.name):
                    if not hasattr(module, CHILD):
                        # Beside the children and not among them: what goes through a list of children is not to meet it.
                        module.__dict__[CHILD] = _Seer(name, found[block.index])
                        seers.append(module)
            ids = torch.arange(1, 5)[None] % network.model.get_input_embeddings().num_embeddings
            stream.run([stream.open(ids, 1)], Nothing(), "attention")
        finally:
            for module in seers:
                del module.__dict__[CHILD]
    return found


@dataclass(frozen=True)
class _Seer:
    """Stands in for an attention's quantizers, and notes that the attention `name` asks for them."""

    name: str
    found: list[str]
    quantizers: Mapping[str, InputQuantizer] = field(default_factory=dict)

    def quantize(self, tensor: str, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` as it is."""
        if self.name not in self.found:
            self.found.append(self.name)
        return x

    def bands(self, key: torch.Tensor, value: torch.Tensor, queries: int) -> tuple[Band, Band]:
        """Returns key and value as they are."""
        return Band(key, key), Band(value, value)
