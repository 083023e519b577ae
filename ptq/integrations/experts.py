"""Fused experts of a model that transformers is about to load: Linears, whose weights are read one by one as they are published."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from ptq.errors import UserError
from ptq.network.experts.published_names import published_names
from ptq.network.network import blocks_of, build_network, take_experts_apart

FUSED = 3
"""Dimensions of a parameter that holds all experts of a block."""


@dataclass(frozen=True)
class TakenApart:
    """Which parameters are Linears now, by the fused parameter's full name, and what of published names is called otherwise here.

    `renamed` has parts of names, (published, here), of which each means the same wherever it stands; `gates` are full names of what
    chooses among experts or weighs them, which stays in floating point.
    """

    fused: frozenset[str] = frozenset()
    renamed: tuple[tuple[str, str], ...] = ()
    gates: frozenset[str] = frozenset()

    def conversions(self, usual: Sequence[WeightTransform]) -> list[WeightTransform]:
        """Returns what transformers does to names and tensors while it loads: its `usual` conversions, but none that stacks experts."""
        kept = [entry for entry in usual if not (isinstance(entry, WeightConverter) and self._stacks(entry))]
        return [*kept, *(WeightRenaming(f".{there}.", f".{here}.") for there, here in self.renamed)]

    def _stacks(self, entry: WeightConverter) -> bool:
        targets = _patterns(entry)[1]
        return any(name.endswith(target.removeprefix(".")) for name in self.fused for target in targets)


def take_apart(model: Any) -> TakenApart:
    """Makes Linears of the fused experts of a model on the meta device, where checkpoints hold them one by one; else leaves it alone.

    Args:
        model: one of transformers' causal language models, without weights.
    """
    if not any(p.dim() == FUSED for p in model.parameters()):
        return TakenApart()
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config)).eval()
        network = build_network(twin)
    except UserError:
        return TakenApart()  # no decoder: it has no experts that are known here
    names = published_names(network)
    experts = [name for block in network.blocks for linears in block.experts.values() for name in linears]
    if not network.pieces or any(f"{name}.weight" not in names for name in experts):
        return TakenApart()
    parts = [(names[name].split("."), name.split(".")) for name in (f"{name}.weight" for name in experts)]
    if any(len(there) != len(here) for there, here in parts):
        return TakenApart()
    renamed = {(a, b) for there, here in parts for a, b in zip(there, here, strict=True) if a != b}
    # What the modules around experts are called is transformers' to rename. Any other part must be theirs alone: it is renamed
    # back wherever it stands when the model is saved.
    around = {part for piece in network.pieces.values() for part in piece.source.split(".")[:-1]}
    own = tuple(sorted((there, here) for there, here in renamed if here not in around))
    others = {part for name, p in model.named_parameters() if p.dim() != FUSED for part in name.split(".")}
    if any(here in others for _, here in own):
        return TakenApart()
    take_experts_apart(model, blocks_of(model))
    fused = frozenset(piece.source for piece in network.pieces.values())
    for name in fused:
        # transformers would fill the fused parameter with random numbers, which is not there any more.
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
    return TakenApart(fused, own, frozenset(gate for block in network.blocks for gate in block.gates))


def _patterns(entry: WeightTransform) -> tuple[list[str], list[str]]:
    return entry._original_source_patterns, entry._original_target_patterns
