"""Kernels as a compiler is given them: operations that it does not look into, between loops of its own.

At many rows a product is a kernel's business, and what compiles well is around it: rounding the input, scales, norms, activation functions.
"""

import weakref
from itertools import count
from typing import Any, Protocol

import torch
from torch.nn import functional

from quantize.kernels.attention_parts import attention_in_parts, wins_in_parts
from quantize.kernels.base import IntegerRows

_LIBRARY = torch.library.Library("ptq", "FRAGMENT")
_LIBRARY.define("integer_sums(Tensor whole, Tensor scale, int handle, int out) -> Tensor")
_LIBRARY.define("linear(Tensor x, int handle, int out) -> Tensor")
_LIBRARY.define("causal_attention(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor")
_HANDLES = count()
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Of a torch that does not tell whether a program is exported nothing is taken for compiled."""


def is_compiled() -> bool:
    """Returns whether what runs is traced to be compiled here; an exported program keeps the definition."""
    return torch.compiler.is_compiling() and not _is_exporting()


class Multiplies(Protocol):
    """Who multiplies by the weight of a Linear."""

    def run(self, given: Any, rows: int) -> torch.Tensor:
        """Returns the product with so many rows."""


_KNOWN: "weakref.WeakValueDictionary[int, Multiplies]" = weakref.WeakValueDictionary()


def handle_of(multiplier: Multiplies) -> int:
    """Returns a number by which compiled code finds `multiplier` for as long as it lives: a graph holds no objects."""
    handle = next(_HANDLES)
    _KNOWN[handle] = multiplier
    return handle


def _known(handle: int) -> Multiplies:
    multiplier = _KNOWN.get(handle)
    if multiplier is None:
        raise RuntimeError(
            "the model was compiled with weights that have been changed or moved since: compile it again"
        )
    return multiplier


def integer_sums(whole: torch.Tensor, scale: torch.Tensor, handle: int, out: int) -> torch.Tensor:
    """Returns `quantize.kernels.base.Multiply`'s result (rows, out), float32, as one operation of a graph.

    Args:
        whole: codes of the input, float32 (rows, in).
        scale: their scales, float32 (rows, 1).
        handle: of who multiplies.
        out: rows of the weight.

    Raises:
        RuntimeError: where who multiplies is no more: its weight was changed or moved after the graph was made.
    """
    sums: torch.Tensor = torch.ops.ptq.integer_sums(whole, scale, handle, out)
    return sums


def _run(whole: torch.Tensor, scale: torch.Tensor, handle: int, out: int) -> torch.Tensor:
    return _known(handle).run(IntegerRows(None, scale, None, whole), len(whole))


_LIBRARY.impl("integer_sums", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("ptq::integer_sums", lib=_LIBRARY)
def _shape(whole: torch.Tensor, scale: torch.Tensor, handle: int, out: int) -> torch.Tensor:
    return whole.new_empty(whole.shape[0], out)


def linear(x: torch.Tensor, handle: int, out: int) -> torch.Tensor:
    """Returns x W^T (..., out) in the type of x (..., in), as one operation of a graph.

    Args:
        x: the input of a Linear.
        handle: of a `quantize.kernels.stored.Products`.
        out: rows of the weight.

    Raises:
        RuntimeError: as `integer_sums`.
    """
    found: torch.Tensor = torch.ops.ptq.linear(x, handle, out)
    return found


def _multiply(x: torch.Tensor, handle: int, out: int) -> torch.Tensor:
    return _known(handle).run(x, x.numel() // x.shape[-1])


_LIBRARY.impl("linear", _multiply, "CompositeExplicitAutograd")


@torch.library.register_fake("ptq::linear", lib=_LIBRARY)
def _multiplied(x: torch.Tensor, handle: int, out: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Returns softmax(scale q k^T) v of whole windows, where a query sees no later key, (batch, tokens, heads, head_dim), as one operation
    of a graph: in parts where that is faster, by torch's own elsewhere.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, kv heads, tokens, head_dim); a key's head serves as many of the query's as there are more of those.
        value: likewise.
        scale: of the scores; None for 1 / sqrt(head_dim).
    """
    found: torch.Tensor = torch.ops.ptq.causal_attention(query, key, value, scale)
    return found


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    if wins_in_parts(query, key):
        found = attention_in_parts(query, key, value, scale)
    else:
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).contiguous()


_LIBRARY.impl("causal_attention", _attend, "CompositeExplicitAutograd")


@torch.library.register_fake("ptq::causal_attention", lib=_LIBRARY)
def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])
