"""WUSH (arXiv 2512.00956): the closed-form map of each input, from its second moments and those of the weights that read it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from ptq.config.options import option
from ptq.errors import UserError
from ptq.steps.transforms._input_maps import InputMaps, OnlineMap, Reading
from quantize.kernels.matmul import product
from quantize.modules.online_maps import OnlineBlocks
from quantize.search import cheapest
from quantize.transforms.wush import decomposed, wush

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
DEARER = 1.1
"""Where a damping costs so many times the best so far, greater ones are not tried: over blocks of SmolLM2 none of them was better."""

SMALL = 128
"""Blocks of so many channels at most are decomposed for every damping, as published: that costs little there."""

Behind = Callable[[float], tuple[torch.Tensor, torch.Tensor]]
"""Gives, for a damping, some tokens (tokens, in) and rows of the weights (some, in) behind its map."""
MapOf = Callable[[float], OnlineBlocks]
"""Gives the map of a damping."""


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
        gram = product(reading.weight.t(), reading.weight).double()
        small = size is not None and size <= SMALL
        behind, map_of = (self._each if small else self._together)(reading, gram, size)
        volume = reading.weight.new_zeros(())
        damping, costs = cheapest(
            sorted(self.options.dampings), lambda damping: float(reading.cost(*behind(damping), volume)), DEARER
        )
        made = map_of(damping)
        return made, f"{made.extra_repr()}, damping {damping:g}, expected error {min(costs):.2%} of the output"

    def _each(self, reading: Reading, gram: torch.Tensor, size: int | None) -> tuple[Behind, MapOf]:
        """Returns what gives tokens and weights behind the map of a damping, and the map: decomposed for each damping."""

        @cache
        def map_of(damping: float) -> OnlineBlocks:
            return OnlineBlocks(wush(reading.hessian, gram, size, self.options.hadamard, damping).unit_volume())

        def behind(damping: float) -> tuple[torch.Tensor, torch.Tensor]:
            made, cost = map_of(damping), reading.cost
            return made(cost.rows), made.inverse_weight(cost.weight, torch.float32)

        return behind, map_of

    def _together(self, reading: Reading, gram: torch.Tensor, size: int | None) -> tuple[Behind, MapOf]:
        """Returns the same of one decomposition for all dampings, whose maps are costed before they are rounded to 16 bits."""
        pair, hadamard = decomposed(reading.hessian, gram, size), self.options.hadamard
        behind = pair.behind(reading.cost.rows, reading.cost.weight, hadamard)
        return behind, lambda damping: OnlineBlocks(pair.unit_volume(damping, hadamard))
