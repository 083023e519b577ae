"""FlatQuant's maps (Sun et al. 2024): a Kronecker product behind a diagonal for each input, learned on the cost of rounding.

Published, they are learned on a block's output with rounding simulated, for hours on a GPU. Here each is learned by itself on a smooth
estimate of the error that rounding its input and its weights leaves (`quantize.transforms.rounding_cost`): seconds a block.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ptq.config.options import option
from ptq.errors import UserError
from ptq.steps.transforms._input_maps import InputMaps, OnlineMap, Reading
from quantize.modules.online_maps import OnlineKronecker
from quantize.transforms.affine import AffineTransform, affine_from_moments, affine_from_scale, cost_of, learned_affine
from quantize.transforms.smooth import smoothing_scale

STARTS = ("wush", "smooth", "hadamard")
DAMPINGS = (0.1, 1.0)
"""Dampings of the closed form that are tried."""


@dataclass(frozen=True)
class Options:
    """How the maps begin, and how long they are learned. Ranges are clipped by steps.clip and the solver's `scales`.

    Attributes:
        starts: what the steps begin from, the one of least cost: ``wush``, the closed form on Kronecker-factored moments;
            ``smooth``, Hadamard factors behind SmoothQuant's scales; ``hadamard``, these factors alone.
        alpha: migration strength of SmoothQuant's scales.
        steps: of Adam for each input; 0 learns nothing.
        rate: of Adam; falls to a tenth by a cosine.
    """

    starts: tuple[str, ...] = option(STARTS, choices=STARTS)
    alpha: float = option(0.5, least=0, most=1)
    steps: int = option(40, least=0)
    rate: float = option(0.02, least=1e-6, most=1)

    def __post_init__(self) -> None:
        if not self.starts:
            raise UserError("steps.affine.starts: empty: list some of wush, smooth, hadamard")


class Step(InputMaps):
    """Maps every input that is rounded by a learned Kronecker product."""

    title: ClassVar[str] = "affine"
    options: Options

    def choose(self, reading: Reading) -> tuple[OnlineMap, str]:
        """Returns the map that was learned from the best start."""
        found = {name: (float(cost_of(start, reading.cost)), start) for name, start in self._starts(reading).items()}
        name = min(found, key=lambda key: found[key][0])
        learned, before, after = learned_affine(found[name][1], reading.cost, self.options.steps, self.options.rate)
        made = OnlineKronecker(learned.left, learned.right, learned.diagonal)
        words = f"{made.extra_repr()}, from {name}, expected error {before:.2%} -> {after:.2%} of the output"
        return made, words

    def _starts(self, reading: Reading) -> dict[str, AffineTransform]:
        """Returns what can be begun from, by name."""
        absmax, columns = reading.cost.rows.abs().amax(0), reading.weight.abs().amax(0)
        smooth, ones = smoothing_scale(absmax, columns, self.options.alpha), torch.ones_like(absmax)
        found: dict[str, AffineTransform] = {}
        if "hadamard" in self.options.starts:
            found["hadamard"] = affine_from_scale(ones, "hadamard")
        if "smooth" in self.options.starts:
            found["smooth"] = affine_from_scale(smooth, "hadamard")
        if "wush" in self.options.starts:
            gram = reading.weight.double().t() @ reading.weight.double()
            for damping in DAMPINGS:
                closed, _ = affine_from_moments(reading.hessian, gram, smooth, damping=damping)
                found[f"wush (damping {damping:g})"] = closed
        return found
