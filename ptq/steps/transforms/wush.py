"""WUSH (arXiv 2512.00956): the closed-form map of each input, from its second moments and those of the weights that read it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ptq.config.options import option
from ptq.errors import UserError
from ptq.steps.transforms._input_maps import InputMaps, OnlineMap, Reading
from quantize.modules.online_maps import OnlineBlocks
from quantize.transforms.rounding_cost import RoundingCost
from quantize.transforms.wush import block_apply, wush

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
DEARER = 1.1
"""Where a damping costs so many times the best so far, greater ones are not tried: over blocks of SmolLM2 none of them was better."""


@dataclass(frozen=True)
class Options:
    """How the maps are made.

    Attributes:
        block: consecutive channels that are mapped together; null for the groups of the input's format, or for all channels where
            it has none. A map of b channels a block stores b x in numbers of 16 bits, which count in the bits of the weights.
        dampings: shares of the mean second moment that are added to all of them, tried from the least on until one costs a tenth more
            than the best; the map that leaves rounding the least cost is taken. Great ones make of it a Hadamard matrix.
        hadamard: spread what the decomposition concentrates by a Hadamard matrix at the end, as published.
    """

    block: int | None = option(None, least=2)
    dampings: tuple[float, ...] = DAMPINGS
    hadamard: bool = True

    def __post_init__(self) -> None:
        if not self.dampings or any(not 0 < damping <= 1 for damping in self.dampings):
            raise UserError(
                f"steps.wush.dampings: {list(self.dampings)} is not valid: list numbers above 0, up to 1, such as [0.01, 1.0]"
            )


class Step(InputMaps):
    """Maps every input that is rounded by WUSH's transform."""

    title: ClassVar[str] = "wush"
    options: Options

    def choose(self, reading: Reading) -> tuple[OnlineMap, str]:
        """Returns the map with the least cost of all dampings."""
        width, size = reading.weight.shape[1], self.options.block or reading.spec.group_size
        if size is not None and width % size:
            raise UserError(
                f"steps.wush.block: {size} does not divide the {width} channels of {reading.names[0]}: use a divisor, or null"
            )
        gram = reading.weight.double().t() @ reading.weight.double()
        best: tuple[float, float, OnlineBlocks] | None = None
        for damping in sorted(self.options.dampings):
            pair = wush(reading.hessian, gram, size, self.options.hadamard, damping)
            made = OnlineBlocks(pair.unit_volume())
            cost = float(_behind(made, reading.cost))
            if best is None or cost < best[0]:
                best = cost, max(pair.damping_activation, pair.damping_weight), made
            elif cost > DEARER * best[0]:
                break
        if best is None:
            raise ValueError("no damping to try")
        return best[2], f"{best[2].extra_repr()}, damping {best[1]:g}, expected error {best[0]:.2%} of the output"


def _behind(made: OnlineBlocks, cost: RoundingCost) -> torch.Tensor:
    """Returns the cost behind a map of unit volume, as its 16 bits have it."""
    return cost(block_apply(cost.rows, made.matrices), made.inverse_weight(cost.weight), cost.rows.new_zeros(()))
