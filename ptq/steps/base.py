"""What a step is: one stage of a recipe."""

from dataclasses import dataclass
from typing import Protocol

from ptq.config import SchemeConfig
from ptq.network import Block, Network
from ptq.statistics import Statistics


@dataclass(frozen=True)
class Plan:
    """What a step may see before the first block.

    `roles` maps Linears to query, key or value; `producers` maps Linears to the module that writes their input, where a
    link was found; `statistics` is None when nothing in the recipe needs them.
    """

    network: Network
    scheme: SchemeConfig
    roles: dict[str, str]
    producers: dict[str, str]
    statistics: Statistics | None


class Step(Protocol):
    """One stage of a recipe, in order: a function-preserving transform or a solver that picks the quantized weights."""

    def plan(self, plan: Plan) -> None:
        """Sees everything once, before the first block."""

    def apply(self, block: Block) -> None:
        """Changes one block whose weights are in memory; called once a block, in stream order."""
