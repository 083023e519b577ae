"""WUSH (arXiv 2512.00956): the closed-form map of each input, from its second moments and those of the weights that read it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ptq.config.options import option
from ptq.errors import UserError
from ptq.steps.transforms._input_maps import InputMaps, OnlineMap, Reading
from quantize.modules.online_maps import OnlineBlocks
from quantize.transforms.rounding_cost import RoundingCost
from quantize.transforms.wush import block_apply, decomposed, wush

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
DEARER = 1.1
"""Where a damping costs so many times the best so far, greater ones are not tried: over blocks of SmolLM2 none of them was better."""

SMALL = 128
"""Blocks of so many channels at most are decomposed for every damping, as published: that costs little there."""


@dataclass(frozen=True)
class Options:
    """How the maps are made.

    Attributes:
        block: consecutive channels that are mapped together; null for the groups of the input's format, or for all channels where
            it has none. A map of b channels a block stores b x in numbers of 16 bits, which count in the bits of the weights.
        dampings: shares of the mean second moment that are added to all of them, tried from the least on until one costs a tenth more
            than the best; the map that leaves rounding the least cost is taken. With blocks of up to 128 channels they are added to
            the moments of input and weights, and great ones make of the map a Hadamard matrix; with greater blocks, which are
            decomposed once, to the second moments behind the map.
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
        unit_volume = self._maps(reading, gram, size)
        best: tuple[float, float, OnlineBlocks] | None = None
        for damping in sorted(self.options.dampings):
            made = OnlineBlocks(unit_volume(damping))
            cost = float(_behind(made, reading.cost))
            if best is None or cost < best[0]:
                best = cost, damping, made
            elif cost > DEARER * best[0]:
                break
        if best is None:
            raise ValueError("no damping to try")
        return best[2], f"{best[2].extra_repr()}, damping {best[1]:g}, expected error {best[0]:.2%} of the output"

    def _maps(self, reading: Reading, gram: torch.Tensor, size: int | None) -> Callable[[float], torch.Tensor]:
        """Returns what gives the matrices of unit volume (blocks, size, size) for a damping."""
        hadamard = self.options.hadamard
        if size is not None and size <= SMALL:
            return lambda damping: wush(reading.hessian, gram, size, hadamard, damping).unit_volume()
        pair = decomposed(reading.hessian, gram, size)
        return lambda damping: pair.unit_volume(damping, hadamard)


def _behind(made: OnlineBlocks, cost: RoundingCost) -> torch.Tensor:
    """Returns the cost behind a map of unit volume, as its 16 bits have it."""
    return cost(
        block_apply(cost.rows, made.matrices), made.inverse_weight(cost.weight, torch.float32), cost.rows.new_zeros(())
    )
