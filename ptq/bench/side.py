"""A side of a comparison: a model that takes prompts and gives tokens, whoever computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig

from quantize.modules.packed import PackedLinear
from quantize.modules.simulated import QuantLinear

DYNAMIC = "dynamic"
"""The cache that transformers generates with unless it is told of another one: it grows with the tokens."""


@dataclass(frozen=True)
class Side:
    """Someone who computes the model.

    Attributes:
        name: what tables call it.
        prefill: computes the logits of the last token of ids (1, tokens).
        decode: generates so many tokens greedily after ids (batch, tokens), none of them ending it early.
        batches: whether it takes more than one sequence.
        weight_bytes: bytes of the Linears' weights as they are stored, the head left out; None where that is not told.
        head_bytes: bytes of the head's weight, which every token reads too; None where that is not told.
        read_bytes: bytes that a token at batch 1 reads of them, told after it has run; None where that is not told.
        note: what has to be said of it.
    """

    name: str
    prefill: Callable[[torch.Tensor], object]
    decode: Callable[[torch.Tensor, int], object]
    batches: bool = True
    weight_bytes: int | None = None
    head_bytes: int | None = None
    read_bytes: Callable[[], int] | None = None
    note: str = ""


def side_of(name: str, model: Any, note: str = "", cache: str = DYNAMIC, compiler: CompileConfig | None = None) -> Side:
    """Returns the side of a transformers model.

    Ids come on the model's device: to bring them there is no part of what is timed.

    Args:
        name: of the side.
        model: of transformers.
        note: what has to be said of it.
        cache: a name of transformers for the cache that it generates with.
        compiler: compiles the pass of one token of each sequence; None for none.
    """
    chosen: dict[str, Any] = {} if cache == DYNAMIC else {"cache_implementation": cache}
    if compiler is not None:
        chosen["compile_config"] = compiler

    @torch.no_grad()
    def prefill(ids: torch.Tensor) -> object:
        return model(ids, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def decode(ids: torch.Tensor, tokens: int) -> object:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0, **chosen,
        )  # fmt: skip

    linears = list(_linears(model))
    stored = sum(_stored_bytes(m) for m in linears)
    head = model.get_output_embeddings()
    own = _stored_bytes(head) if isinstance(head, PackedLinear | QuantLinear | torch.nn.Linear) else None
    return Side(name, prefill, decode, True, stored, own, lambda: sum(_read_bytes(m) for m in linears), note)


def _linears(model: Any) -> Any:
    """Yields the Linears of a model but its head, whose weight is the embedding's or stays as it is."""
    head = model.get_output_embeddings()
    return (m for m in model.modules() if isinstance(m, PackedLinear | QuantLinear | torch.nn.Linear) and m is not head)


def _stored_bytes(module: Any) -> int:
    if isinstance(module, PackedLinear | QuantLinear):
        return module.stored_bytes()
    return int(module.weight.numel() * module.weight.element_size())


def _read_bytes(module: Any) -> int:
    if isinstance(module, PackedLinear):
        return module.read_bytes()
    if isinstance(module, QuantLinear) and module.integer:
        return int(module.codes.numel())
    return int(module.weight.numel() * module.weight.element_size())
