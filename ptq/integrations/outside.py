"""Token embedding and head as packed modules, where a scheme gives them formats of their own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.network.network import replace_module
from quantize.modules.packed import PackedLinear
from quantize.modules.packed_embedding import PackedEmbedding, packed_embedding, plain_embedding
from quantize.spec.quant_spec import QuantSpec
from quantize.spec.rules import OUTSIDE

_TIED_KEYS = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where transformers notes which parameters are one, target by source: the class's patterns, and the full names of a model's."""


@dataclass(frozen=True)
class OutsideModule:
    """A module that a scheme has a format for: `tensor` is ``embedding`` or ``head``, `tied` a head whose weight is the embedding's."""

    tensor: str
    name: str
    spec: QuantSpec
    tied: bool = False


def choose_outside(model: nn.Module, scheme: SchemeConfig, tied: dict[str, str]) -> list[OutsideModule]:
    """Returns the embedding and the head, in this order, that `scheme` has formats for, having checked all that needs no values.

    Args:
        model: a transformers model.
        scheme: with formats that `ptq.config.checking.check_specs` has passed.
        tied: another name of every parameter that has one.

    Raises:
        UserError: for a model without such a module, a format that it cannot have, or one of two tied weights.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: list[OutsideModule] = []
    embedding: nn.Module | None = None
    for tensor, getter in zip(OUTSIDE, ("get_input_embeddings", "get_output_embeddings"), strict=True):
        get = getattr(model, getter, None)
        module = get() if callable(get) else None
        embedding = module if tensor == "embedding" else embedding
        one = tensor == "head" and module is not None and _is_tied(names, tied, module, embedding)
        spec: QuantSpec | None = getattr(scheme, tensor)
        if one and scheme.head != scheme.embedding:
            raise UserError(
                "scheme.head: another format than scheme.embedding, but this model ties the two weights: give both the same"
            )
        if spec is None:
            continue
        kind = nn.Embedding if tensor == "embedding" else nn.Linear
        if module is None or id(module) not in names or not isinstance(module, kind):
            raise UserError(f"scheme.{tensor}: {type(model).__name__} has no such {kind.__name__}: use null")
        try:
            emptied_outside(module, spec)
        except ValueError as error:
            raise UserError(f"scheme.{tensor}: {error}: use another format, or null") from None
        found.append(OutsideModule(tensor, names[id(module)], spec, one))
    return found


def emptied_outside(module: nn.Module, spec: QuantSpec) -> PackedEmbedding | PackedLinear:
    """Returns an empty packed module in the place of an embedding or a head, on its device. Raises `ValueError` for a format it cannot have."""
    if isinstance(module, nn.Embedding):
        return packed_embedding(module, spec)
    weight: Any = module.weight
    bias = isinstance(module.bias, torch.Tensor)
    made = PackedLinear(weight.shape[1], weight.shape[0], bias, spec, None, weight.dtype, weight.device)
    return made.train(module.training)


def share_(model: nn.Module, head: str, embedding: str) -> None:
    """Lets a packed head hold the very codes and scales of the packed embedding, and tells transformers, which saves them once."""
    mine: Any = model.get_submodule(head)
    other: Any = model.get_submodule(embedding)
    for name in mine.stored_names:
        setattr(mine, name, getattr(other, name))
    tie_names_(model, head, embedding, mine.stored_names)


def tie_names_(model: nn.Module, head: str, embedding: str, parameters: tuple[str, ...]) -> None:
    """Notes where transformers looks that these parameters of the head are the embedding's, and no others are."""
    for attribute in _TIED_KEYS:
        known: dict[str, str] | None = getattr(model, attribute, None)
        if known:
            kept = {target: source for target, source in known.items() if target.rpartition(".")[0] != head}
            setattr(model, attribute, kept | {f"{head}.{name}": f"{embedding}.{name}" for name in parameters})


@torch.no_grad()
def quantize_outside_(model: nn.Module, chosen: list[OutsideModule]) -> None:
    """Puts packed modules in the places of those `chosen`, filled with their weights, rounded to nearest.

    Raises:
        UserError: for NaN or inf in a weight, before the first replacement.
    """
    made: dict[str, PackedEmbedding | PackedLinear] = {}
    for one in chosen:
        old: Any = model.get_submodule(one.name)
        new = emptied_outside(old, one.spec)
        if not one.tied:
            try:
                new.store(old.weight)
            except ValueError as error:
                raise UserError(f"{one.name}.weight: {error}".replace("the weight ", "")) from None
        if isinstance(old.bias if isinstance(old, nn.Linear) else None, torch.Tensor):
            new.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=False)
        made[one.name] = new
    for name, new in made.items():
        replace_module(model, name, new)
    for one in chosen:
        if one.tied:
            share_(model, one.name, chosen[0].name)


@torch.no_grad()
def dequantize_outside_(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts plain modules in the places of a packed embedding and of a head that shares its codes."""
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, PackedEmbedding)}
    for name, packed in embeddings.items():
        codes = next(iter(packed.stored.values()))
        heads = [
            n for n, m in model.named_modules()
            if isinstance(m, PackedLinear) and any(t is codes for t in m.stored.values())
        ]  # fmt: skip
        weight = nn.Parameter(packed.dequantized(dtype), requires_grad=False)
        replace_module(model, name, plain_embedding(packed, weight))
        for head in heads:
            old: Any = model.get_submodule(head)
            new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
            new.weight = weight
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
            replace_module(model, head, new.train(old.training))
            tie_names_(model, head, name, ("weight",))


def _is_tied(names: dict[int, str], tied: dict[str, str], head: nn.Module, embedding: nn.Module | None) -> bool:
    if embedding is None or id(head) not in names or id(embedding) not in names:
        return False
    mine, other = (f"{names[id(m)]}.weight" for m in (head, embedding))
    return tied.get(mine) == other or tied.get(other) == mine
