"""Causal attention on CPUs, query by query no further than it may look.

torch's own computes all keys of up to 512 tokens for each query and masks half of them: in parts of `PART` queries, each with the
keys up to its last one, attention over 512 tokens takes some 0.7 of its time, over 1024 some 0.9 (`python -m experiments.bench.attention_parts`).
"""

import torch
from torch.nn import functional

PART = 64
"""Queries that are computed together."""
LONGEST = 1024
"""Tokens above which torch's own leaves out as much by itself."""


def wins_in_parts(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Returns whether `attention_in_parts` is faster than torch's own: whole windows of some length, without gradients, on a CPU.

    Query (batch, heads, tokens, head_dim), key (batch, kv heads, tokens, head_dim).
    """
    if query.device.type != "cpu" or torch.jit.is_tracing() or query.shape[2] != key.shape[2]:
        return False
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return 2 * PART < query.shape[2] <= LONGEST and not needs_gradient


def attention_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Returns softmax(scale q k^T) v, where a query sees no later key: (batch, heads, tokens, head_dim), to rounding.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, kv heads, tokens, head_dim); a key's head serves as many of the query's as there are more of those.
        value: likewise.
        scale: of the scores; None for 1 / sqrt(head_dim).
    """
    tokens = query.shape[2]
    result = query.new_empty(*query.shape[:3], value.shape[3])
    # Zeros, then a triangle of what is not seen: each part's mask is a stretch of it, in the type that torch would convert one to.
    unseen = query.new_full((PART, PART), -torch.inf).triu(1)
    masks = functional.pad(unseen, (tokens, 0))
    for start in range(0, tokens, PART):
        end = min(start + PART, tokens)
        mask = masks[: end - start, tokens - start : tokens - start + end]
        result[:, :, start:end] = functional.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask, scale=scale, enable_gqa=True
        )
    return result
