"""A cache of keys or values: packed codes with scales, the first and the most recent tokens exact; and attention over it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from quantize.codecs.base import Encoded, stored_bytes
from quantize.codecs.packing import pack, packed_length, unpack

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Multipliers of a range that the search for the least squared error tries."""
REFITS = 3
"""How often it fits scale and least value to the codes after that: on normal values 6% less error than the multipliers alone leave."""
_MOST = torch.finfo(torch.float16).max
Between = Callable[[torch.Tensor, slice], torch.Tensor]
"""From what the model multiplies to what is stored, or back: given states (batch, heads, tokens, channels) and which tokens they are."""


def as_they_are(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """Returns `x`: what is stored is what the model multiplies."""
    return x


@dataclass(frozen=True)
class CacheFormat:
    """How a cache holds keys, or values.

    A range runs from the least value to the greatest, and need not contain 0: the scale and the least value of each are
    stored in fp16, value = code * scale + least (KIVI, Liu et al. 2024, equation 1).

    Attributes:
        bits: width of a code, 2 to 8.
        group: values that share a scale: channels of one token, or tokens of one channel.
        along: ``channels`` for groups inside a token, ``tokens`` for groups inside a channel.
        window: the most recent tokens, the present one among them, that stay exact.
        first: the first tokens, which stay exact.
        search: choose scale and least value by the squared error instead of by the range.
    """

    bits: int
    group: int
    along: Literal["channels", "tokens"] = "channels"
    window: int = 0
    first: int = 0
    search: bool = False

    @property
    def closing(self) -> int:
        """How many tokens are rounded together: a group along tokens closes when its last one has left the window."""
        return self.group if self.along == "tokens" else 1

    def settled(self, tokens: int) -> int:
        """Returns how many of the first of `tokens` tokens no longer change: those kept for good, and those that are rounded."""
        begin = min(self.first, tokens)
        return begin + max(0, tokens - begin - self.window) // self.closing * self.closing

    def settled_for(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """Returns `settled` as each of the queries at positions `start` to `end - 1` finds it, int64 (end - start,)."""
        tokens = torch.arange(start + 1, end + 1, device=device)
        begin = tokens.clamp(max=self.first)
        return begin + (tokens - begin - self.window).clamp(min=0) // self.closing * self.closing

    def nbytes(self, tokens: int, channels: int, exact: int) -> int:
        """Returns the bytes that one head's cache of `tokens` tokens takes, `exact` bytes for each value that is exact."""
        rounded = self.settled(tokens) - min(self.first, tokens)
        return round(rounded * self.token_bytes(channels)) + (tokens - rounded) * channels * exact

    def token_bytes(self, channels: int) -> float:
        """Returns the bytes that a token that is rounded takes in one head: codes, and its share of scales and least values."""
        return packed_length(channels, self.bits) + 4 * channels / self.group


EXACT = CacheFormat(8, 1, window=1 << 60)
"""Nothing is ever rounded."""


def _blocks(x: torch.Tensor, form: CacheFormat) -> tuple[torch.Tensor, int]:
    """Returns a view of `x` in which the values that share a scale are one dimension, and that dimension."""
    along = -1 if form.along == "channels" else -2
    if x.shape[along] % form.group:
        raise ValueError(f"group: {form.group} does not divide the {x.shape[along]} {form.along}")
    return x.unflatten(along, (-1, form.group)), along


def quantize_states(x: torch.Tensor, form: CacheFormat) -> Encoded:
    """Returns codes, one a byte, scales and least values of `x` (..., tokens, channels); groups along tokens have to be full.

    Scales and least values: fp16, (..., tokens, groups) or (..., groups, channels). NaN and inf spread through them.
    """
    blocks, dim = _blocks(x.float(), form)
    low, high = blocks.amin(dim, keepdim=True), blocks.amax(dim, keepdim=True)
    scale, least = _stored((high - low) / (2**form.bits - 1), low)
    if form.search:
        scale, least = _searched(blocks, low, high, form.bits, dim)
    codes = _codes(blocks, scale, least, form.bits).to(torch.uint8).reshape(x.shape)
    return {"codes": codes, "scale": scale.squeeze(dim).half(), "least": least.squeeze(dim).half()}


def _stored(scale: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scales and least values as fp16 holds them, in float32."""
    return scale.clamp(max=_MOST).half().float(), least.clamp(-_MOST, _MOST).half().float()


def _codes(blocks: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, bits: int) -> torch.Tensor:
    # A range too narrow for fp16 has all its values at the least one.
    steps = torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))
    return ((blocks - least) / steps).round_().clamp_(0, 2**bits - 1)


def _searched(
    blocks: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scales and least values of the least squared error: the best of `SHRINKS`, then `REFITS` times the line through
    the values by least squares, with the codes that they have, and the codes anew.
    """
    best = torch.full_like(low, torch.inf)
    chosen = codes = None
    tries = len(SHRINKS) + REFITS
    for turn in range(tries):
        if turn < len(SHRINKS) or codes is None:
            cut = (high - low) * (1 - SHRINKS[turn]) / 2
            scale, least = _stored((high - low - 2 * cut) / (2**bits - 1), low + cut)
        else:
            scale, least = _line(blocks, codes, dim)
        trial = _codes(blocks, scale, least, bits)
        error = (trial * scale + least - blocks).square_().sum(dim, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        if chosen is None or codes is None:
            chosen, codes = (scale, least), trial
            continue
        chosen = torch.where(better, scale, chosen[0]), torch.where(better, least, chosen[1])
        codes = torch.where(better, trial, codes)
    return chosen  # type: ignore[return-value]


def _line(blocks: torch.Tensor, codes: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scale and the least value that give the values by their codes with the least squared error."""
    middle, value = codes.mean(dim, keepdim=True), blocks.mean(dim, keepdim=True)
    spread = (codes - middle).square_().sum(dim, keepdim=True)
    scale = ((codes - middle) * (blocks - value)).sum(dim, keepdim=True) / torch.where(spread > 0, spread, 1.0)
    return _stored(scale, value - scale * middle)


def dequantize_states(parts: Encoded, form: CacheFormat, dtype: torch.dtype) -> torch.Tensor:
    """Returns the states (..., tokens, channels) that `quantize_states` gave codes of, clamped to the finite range of `dtype`."""
    codes, dim = _blocks(parts["codes"].float(), form)
    values = codes * parts["scale"].float().unsqueeze(dim) + parts["least"].float().unsqueeze(dim)
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype).reshape(parts["codes"].shape)


def round_states(x: torch.Tensor, form: CacheFormat) -> torch.Tensor:
    """Returns `x` (..., tokens, channels) as a cache gives it back, in the type of `x`."""
    return dequantize_states(quantize_states(x, form), form, x.dtype)


class CachedStates:
    """The keys, or values, of one attention: (batch, heads, tokens, channels), appended to and read back.

    What is rounded is held as packed codes, scales and least values; nothing is held twice.

    Args:
        form: how they are held.
        store: from what the model multiplies to what is stored.
        load: the way back.
    """

    def __init__(self, form: CacheFormat, store: Between = as_they_are, load: Between = as_they_are):
        self.form, self._store, self._load = form, store, load
        self.first: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.rounded: Encoded = {}
        self._channels = 0

    @property
    def tokens(self) -> int:
        """How many tokens are held."""
        return self.settled + (0 if self.recent is None else self.recent.shape[-2])

    @property
    def settled(self) -> int:
        """How many of them are the first ones, or rounded."""
        begin = 0 if self.first is None else self.first.shape[-2]
        return begin + (self.rounded["codes"].shape[-2] if self.rounded else 0)

    def append(self, x: torch.Tensor) -> None:
        """Adds the states of new tokens (batch, heads, tokens, channels), and rounds what leaves the window."""
        self._channels = x.shape[-1]
        if self.first is None:
            self.first = self.recent = x[..., :0, :]
        recent = torch.cat([self.recent, x], -2)  # type: ignore[list-item]
        missing = min(self.form.first - self.first.shape[-2], recent.shape[-2])
        if missing > 0:
            self.first, recent = torch.cat([self.first, recent[..., :missing, :]], -2), recent[..., missing:, :]
        start = self.settled
        leaving = self.form.settled(start + recent.shape[-2]) - start
        if leaving > 0:
            out = self._store(recent[..., :leaving, :], slice(start, start + leaving))
            parts = quantize_states(out, self.form)
            parts["codes"] = pack(parts["codes"], self.form.bits)
            held = self.rounded
            self.rounded = {k: torch.cat([held[k], part], -2) if held else part for k, part in parts.items()}
        # A copy: a view would hold all that has left.
        self.recent = recent[..., max(leaving, 0) :, :].clone()

    def read(self) -> torch.Tensor:
        """Returns all tokens, in the type that they came in."""
        if self.first is None or self.recent is None:
            raise ValueError("the cache holds no token yet")
        parts = [self.first, self.recent]
        if self.rounded:
            codes = unpack(self.rounded["codes"], self.form.bits, self._channels)
            values = dequantize_states({**self.rounded, "codes": codes}, self.form, self.recent.dtype)
            parts.insert(1, self._load(values, slice(self.first.shape[-2], self.settled)))
        return torch.cat(parts, -2)

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lets `change` act on every tensor that is held, each with the batch as its first dimension."""
        if self.first is not None and self.recent is not None:
            self.first, self.recent = change(self.first), change(self.recent)
        self.rounded = {name: change(tensor) for name, tensor in self.rounded.items()}

    @property
    def values(self) -> int:
        """How many numbers the states are."""
        return 0 if self.recent is None else math.prod(self.recent.shape[:-2]) * self.tokens * self._channels

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        exact = [tensor for tensor in (self.first, self.recent) if tensor is not None]
        return stored_bytes(self.rounded) + sum(tensor.numel() * tensor.element_size() for tensor in exact)


@dataclass(frozen=True)
class Band:
    """States as queries find them one after another: `rounded` up to what has settled for each query, `exact` from there on.

    Attributes:
        exact: (batch, heads, tokens, channels).
        rounded: the same, rounded where the last query finds it so.
        settled: how many tokens have settled for each query, ascending, int64 (queries,); None where `exact` is all there is.
    """

    exact: torch.Tensor
    rounded: torch.Tensor
    settled: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        form: CacheFormat,
        queries: int,
        settled: int = 0,
        store: Between = as_they_are,
        load: Between = as_they_are,
    ) -> "Band":
        """Returns the states `x` (batch, heads, tokens, channels) as the last `queries` of their tokens find them.

        Args:
            x: exact, but for the first `settled` tokens, which are as the cache holds them.
            form: how the cache holds them.
            queries: how many of the last tokens ask.
            settled: how many tokens the cache has settled before.
            store: see `CachedStates`.
            load: see `CachedStates`.
        """
        tokens = x.shape[-2]
        start, end = max(settled, min(form.first, tokens)), form.settled(tokens)
        rounded = x
        if end > start:
            which = slice(start, end)
            middle = load(round_states(store(x[..., which, :].detach(), which), form), which)
            if x.requires_grad:  # straight through the rounding
                middle = x[..., which, :] + (middle - x[..., which, :]).detach()
            rounded = torch.cat([x[..., :start, :], middle, x[..., end:, :]], -2)
        return cls(x, rounded, form.settled_for(tokens - queries, tokens, x.device))

    def after(self, prefix: torch.Tensor) -> "Band":
        """Returns the band with the exact states `prefix` (1, heads, tokens, channels) before all others, of no window's counting."""
        prefix = prefix.to(self.exact.dtype).expand(len(self.exact), -1, -1, -1)
        exact = torch.cat([prefix, self.exact], -2)
        rounded = exact if self.rounded is self.exact else torch.cat([prefix, self.rounded], -2)
        return Band(exact, rounded, None if self.settled is None else self.settled + prefix.shape[-2])

    def repeated(self, heads: int) -> "Band":
        """Returns the band with each head `heads` times, as grouped queries ask."""
        exact = self.exact.repeat_interleave(heads, 1)
        same = self.rounded is self.exact
        return Band(exact, exact if same else self.rounded.repeat_interleave(heads, 1), self.settled)

    def _ends(self, rows: slice) -> tuple[torch.Tensor, int, int]:
        settled = self.settled[rows]  # type: ignore[index]
        return settled, int(settled[0]), int(settled[-1])

    def scores(self, query: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns the products (batch, heads, rows, tokens) of the queries `rows`, given as `query`, with these keys."""
        if self.settled is None or self.rounded is self.exact:
            return query @ self.exact.transpose(-1, -2)
        settled, low, high = self._ends(rows)
        scores = query @ torch.cat([self.rounded[..., :low, :], self.exact[..., low:, :]], -2).transpose(-1, -2)
        if high > low:
            held = torch.arange(low, high, device=query.device) < settled[:, None]
            middle = query @ self.rounded[..., low:high, :].transpose(-1, -2)
            scores[..., low:high] = torch.where(held, middle, scores[..., low:high])
        return scores

    def mixed(self, probabilities: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns the sums (batch, heads, rows, channels) of these values by the `probabilities` (batch, heads, rows, tokens)
        of the queries `rows`.
        """
        if self.settled is None or self.rounded is self.exact:
            return probabilities @ self.exact
        settled, low, high = self._ends(rows)
        result = probabilities @ torch.cat([self.rounded[..., :low, :], self.exact[..., low:, :]], -2)
        if high > low:
            held = torch.arange(low, high, device=probabilities.device) < settled[:, None]
            shift = self.rounded[..., low:high, :] - self.exact[..., low:high, :]
            result = result + (probabilities[..., low:high] * held) @ shift
        return result
