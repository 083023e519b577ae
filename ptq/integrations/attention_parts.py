"""The attention of a packed model whose Linears have kernels: transformers' own, causal windows in parts on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from ptq.network.attention import use_attention
from quantize.kernels.attention_parts import attention_in_parts, wins_in_parts
from quantize.kernels.opaque import causal_attention, is_compiled

NAME, USUAL = "ptq_parts", "sdpa"


def use_attention_in_parts_(model: nn.Module, enabled: bool) -> None:
    """Lets a model of transformers that has its usual attention compute causal windows in parts, or no longer.

    Another attention that a user chose, and a model of another library, are left alone.
    """
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if switch is None:
        return
    if enabled and chosen == USUAL:
        use_attention(model, NAME, _attention)
    elif not enabled and chosen == NAME:
        switch(USUAL)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention of transformers' interface: returns (batch, tokens, heads, head_dim)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    others = (kwargs.get(name) for name in ("softcap", "position_bias", "cache", "s_aux"))
    plain = attention_mask is None and causal and not dropout and all(other is None for other in others)
    if plain and _traced(query, key):
        return causal_attention(query, key, value, scaling), None
    if plain and wins_in_parts(query, key):
        return attention_in_parts(query, key, value, scaling).transpose(1, 2).contiguous(), None
    usual = transformers.AttentionInterface()[USUAL]
    result: tuple[torch.Tensor, None] = usual(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


def _traced(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Returns whether a compiler traces the attention of whole windows on a CPU: a graph has one operation for all lengths."""
    return is_compiled() and query.device.type == "cpu" and query.shape[2] == key.shape[2] and query.shape[2] > 1
