"""The quantized cache in transformers: what ``generate`` keeps of keys and values, packed, as evaluation has simulated it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ptq.errors import UserError
from ptq.network.attention import CHILD, AttentionQuantizers, Settled, show_tables
from quantize.modules.cache import EXACT, CachedStates
from quantize.transforms.rotary import Rotary

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


class RotaryTables:
    """The rotary embeddings of all tokens of a cache, which its layers share: cosines and sines (1 or batch, tokens, channels)."""

    def __init__(self, layout: str):
        self.layout = layout
        self.last: object = None
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None

    def extend(self, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds those of new tokens, once for all layers that are called with the same ones."""
        if self.last is tables:
            return
        self.last = tables
        cos, sin = tables
        if self.cos is not None and self.sin is not None:
            rows = max(len(self.cos), len(cos))
            cos, sin = (
                torch.cat([a.expand(rows, -1, -1), b.expand(rows, -1, -1)], 1)
                for a, b in ((self.cos, cos), (self.sin, sin))
            )
        self.cos, self.sin = cos, sin

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RotaryTables":
        """Returns the tables after `change` of the batch; one row for all samples stays."""
        result = RotaryTables(self.layout)
        if self.cos is not None and self.sin is not None:
            result.cos, result.sin = (t if len(t) == 1 else change(t) for t in (self.cos, self.sin))
        return result

    @property
    def rotary(self) -> Rotary:
        """The embeddings of all tokens so far."""
        if self.cos is None or self.sin is None:
            raise ValueError("no token has come yet")
        return Rotary(self.cos, self.sin, self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(t.numel() * t.element_size() for t in (self.cos, self.sin) if t is not None)


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one attention, held as its quantizers say: a layer of any cache of transformers.

    `update` gives the attention all keys and values, those that are rounded decoded, and tells its quantizers which these
    are; keys and values of the present call are exact, so that each of its queries finds them as it would alone.

    Args:
        quantizers: of the attention that the layer serves; with a cache's formats.
        tables: of the rotary embeddings, where keys are held without.
    """

    is_sliding = False

    def __init__(self, quantizers: AttentionQuantizers, tables: RotaryTables | None = None):
        super().__init__()
        self._quantizers, self.tables = quantizers, tables
        self.states: dict[str, CachedStates] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes room for keys and values of this type."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for tensor in ("key", "value"):
            form = self._quantizers.cache.of(tensor) if self._quantizers.cache is not None else None
            between = (self._undo, self._do) if tensor == "key" and self.tables is not None else ()
            self.states[tensor] = CachedStates(form or EXACT, *between)
        self.is_initialized = True

    def _undo(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        return self.tables.rotary.undo(x, tokens)  # type: ignore[union-attr]

    def _do(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        return self.tables.rotary.do(x, tokens)  # type: ignore[union-attr]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values (batch, kv heads, tokens, head_dim); returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.tables is not None and self._quantizers.tables is not None:
            self.tables.extend(self._quantizers.tables)
        settled, found = {}, []
        for tensor, new in (("key", key_states), ("value", value_states)):
            held, x = self.states[tensor], self._quantizers.transformed(tensor, new)
            settled[tensor] = held.settled
            found.append(torch.cat([held.read(), x], -2) if held.tokens else x)
            held.append(x)
        self._quantizers.settled = Settled(settled, None if self.tables is None else self.tables.rotary)
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Returns how many tokens are held."""
        return self.states["key"].tokens if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many keys `query_length` new queries meet, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: it grows."""
        return -1

    def reset(self) -> None:
        """Drops all that is held."""
        self.states, self.is_initialized = {}, False
        if self.tables is not None:
            self.tables = RotaryTables(self.tables.layout)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what has been rounded cannot become exact again.

        Raises:
            UserError: unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise UserError(
                "past_key_values: a quantized cache cannot drop its last tokens: generate without an assistant"
            )

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for held in self.states.values():
            held.change(change)
        if self.tables is not None:
            self.tables = self.tables.changed(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Gives each beam what the beam `beam_idx` held; beams of one sample share their positions."""
        for held in self.states.values():
            held.change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample."""
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some samples."""
        self._change(lambda t: t[indices.to(t.device) if isinstance(indices, torch.Tensor) else indices])

    def offload(self) -> None:
        """Moves what is held to the CPU."""
        for held in self.states.values():
            held.change(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves what is held back."""
        for held in self.states.values():
            held.change(lambda t: t.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are held, without the tables that layers share."""
        return sum(held.nbytes for held in self.states.values())


def use_packed_cache(model: nn.Module) -> None:
    """Lets the attentions of `model` whose quantizers have a cache's formats hold keys and values packed.

    Every empty cache that transformers makes, or is given, becomes a quantized one as the attentions are called; in
    ``generate``, in a loop of one's own, or in a pipeline.
    """
    for module in model.modules():
        quantizers = getattr(module, CHILD, None)
        if isinstance(quantizers, AttentionQuantizers) and quantizers.cache is not None:
            if quantizers.cache.rotary is not None:
                show_tables(module)
            if _take not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_take, with_kwargs=True)


def _take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Puts a packed layer into the cache that the attention is called with, where there is an empty one of transformers' own."""
    # What models call the argument differs.
    cache: Any = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
    quantizers = getattr(module, CHILD, None)
    if cache is None or not isinstance(quantizers, AttentionQuantizers) or quantizers.cache is None:
        return
    place: Any = module.layer_idx
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= place:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[place]
    if isinstance(layer, PackedLayer) and layer._quantizers is quantizers:
        return
    if type(layer) not in _PLAIN:
        raise UserError(
            f"past_key_values: {type(layer).__name__}, but the model's scheme has a cache of its own: leave cache_implementation null"
        )
    if layer.get_seq_length():
        raise UserError("past_key_values: holds tokens that were not quantized: start with an empty cache")
    cache.layers[place] = PackedLayer(quantizers, _tables(cache, quantizers))


def _tables(cache: Cache, quantizers: AttentionQuantizers) -> RotaryTables | None:
    """Returns the tables that another layer has begun with the same embeddings, or new ones."""
    if quantizers.cache is None or quantizers.cache.rotary is None:
        return None
    for layer in cache.layers:
        found = layer.tables if isinstance(layer, PackedLayer) else None
        if found is not None and found.last is quantizers.tables and found.layout == quantizers.cache.rotary:
            return found
    return RotaryTables(quantizers.cache.rotary)


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes.

    Attributes:
        tokens: that are held.
        nbytes: of keys and values: codes, scales, least values, and what is exact.
        tables: bytes of rotary embeddings beside them, where keys are held without.
        values: how many numbers keys and values are.
    """

    tokens: int
    nbytes: int
    tables: int
    values: int

    @property
    def bits_per_value(self) -> float:
        """Bits that a number takes, all that is held counted."""
        return 8 * (self.nbytes + self.tables) / max(1, self.values)


def cache_size(cache: Cache) -> CacheSize:
    """Returns what `cache` takes, measured: the bytes of every tensor that its layers hold."""
    nbytes = values = tokens = 0
    tables: dict[int, int] = {}
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, PackedLayer):
            nbytes += layer.nbytes
            values += sum(held.values for held in layer.states.values())
            if layer.tables is not None:
                tables[id(layer.tables)] = layer.tables.nbytes
        elif (keys := getattr(layer, "keys", None)) is not None:
            both = (keys, layer.values)
            nbytes += sum(t.numel() * t.element_size() for t in both)
            values += sum(t.numel() for t in both)
        tokens = max(tokens, layer.get_seq_length())
    return CacheSize(tokens, nbytes, sum(tables.values()), values)
