"""Experts are alike: what one of them shows holds for all, and is proved for all."""

from collections.abc import Mapping, Sequence

import torch

from ptq.network.network import Block


class Twins:
    """The Linears of a block's experts by what they are in theirs.

    Args:
        block: the block.
        called: full names of the Linears that have been called, in order.
    """

    def __init__(self, block: Block, called: Sequence[str]):
        self.block = block
        self._of: dict[str, tuple[str, int]] = {}
        experts = block.experts
        for expert, names in experts.items():
            self._of |= {name: (expert, place) for place, name in enumerate(names)}
        reached = [self._of[name][0] for name in called if name in self._of]
        self._experts = experts
        self._firsts: dict[str, str] = {}
        for expert in (*reached, *experts):
            self._firsts.setdefault(_mixture_of(expert), expert)

    def beside(self, one: str, other: str) -> bool:
        """Whether two Linears are one expert's, or hang in one module."""
        if one in self._of and other in self._of:
            return self._of[one][0] == self._of[other][0]
        return one.rpartition(".")[0] == other.rpartition(".")[0]

    def is_first(self, name: str) -> bool:
        """Whether the Linear is of the expert that stands for the others of its mixture."""
        return name in self._of and self._firsts[_mixture_of(self._of[name][0])] == self._of[name][0]

    def is_twin(self, name: str) -> bool:
        """Whether the Linear is of an expert that another one stands for."""
        return name in self._of and not self.is_first(name)

    def alike(self, name: str) -> list[str]:
        """Returns what is to each expert of its mixture what the Linear is to its own; none for Linears of no expert."""
        if name not in self._of:
            return []
        expert, place = self._of[name]
        return [names[place] for e, names in self._experts.items() if _mixture_of(e) == _mixture_of(expert)]

    def of(self, *names: str) -> list[tuple[str, ...]]:
        """Returns what is to the other experts what these Linears are to the first."""
        first = self._of[names[0]][0]
        others = [e for e in self._experts if _mixture_of(e) == _mixture_of(first) and e != first]
        return [tuple(self._experts[expert][self._of[name][1]] for name in names) for expert in others]


def _mixture_of(expert: str) -> str:
    return expert.rpartition(".")[0]


def in_stages(block: Block, inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Returns the Linears that read one tensor together, in the order of their calls.

    Experts that were not called have the stages of one that was, each after that stage of the expert before them.
    """
    readings: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        readings.setdefault(id(tensor), []).append(name)
    stages = [tuple(names) for names in readings.values()]
    twins = Twins(block, list(inputs))
    for stage in list(stages):
        if not twins.is_first(stage[0]):
            continue
        at = stages.index(stage)
        for other in twins.of(*stage):
            if other[0] in inputs:
                at = stages.index(other) if other in stages else at
            else:
                at += 1
                stages.insert(at, other)
    return stages
