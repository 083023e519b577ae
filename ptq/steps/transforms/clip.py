"""Clipped inputs: how much of an input's range is kept, searched by the output error of the Linears that read it."""

import math
import pathlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch

from ptq.calibration.samples import Samples
from ptq.calibration.statistics import ChannelStatistics
from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError
from ptq.network.block_stream import Flow
from ptq.network.network import Block, weight_of
from ptq.steps._solving import Rows, captures_of, labels_of, specs_of
from ptq.steps._step import INPUT, Context, StepPlan, Transform
from quantize.modules.simulated import InputQuantizer, fake_quantize_dynamic
from quantize.solvers.clip import INPUT_RATIOS, input_clip_ratio
from quantize.spec.quant_spec import QuantSpec

SEARCH_VALUES = 1 << 20
"""Numbers of one input on which the search measures output errors."""
DEARER = 1.25
"""Where a ratio's error is so many times the least so far, smaller ratios are not tried."""
OWN_SEARCH = ("percentile", "mse")
"""Estimators that choose themselves how much of a range is kept."""


@dataclass(frozen=True)
class Options:
    """What the search tries.

    Attributes:
        ratios: shares of a range, above 0, up to 1; the first is kept unless another leaves less error. Ranges of weights
            are the solver's: `scales` of gptq and of rtn.
    """

    ratios: tuple[float, ...] = option(INPUT_RATIOS, least=0.01, most=1)

    def __post_init__(self) -> None:
        if not self.ratios:
            raise UserError("steps.clip.ratios: empty: list shares of a range such as [1.0, 0.9, 0.8]")


class Step(Transform):
    """Chooses `QuantSpec.clip` of every input that the scheme rounds to integers, dynamic or static.

    What the network computes without rounding stays as it is; exports have no field for a clipped input.
    """

    acts: ClassVar[frozenset[str]] = frozenset({INPUT})
    proved: ClassVar[bool] = False
    by_block: ClassVar[bool] = True
    last: ClassVar[bool] = True

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs what static ranges need. `UserError` where the scheme leaves inputs alone, or nothing is left to search."""
        if not any(_searched(spec) for spec in tensor_specs(scheme, "input")):
            raise UserError(
                "steps.clip: no input of the scheme is int with range minmax or ema, so there is nothing to clip: ~steps.clip"
            )
        return captures_of(scheme)

    def plan(self, context: Context) -> StepPlan:
        """Searches every input, on tokens of the calibration samples as the steps so far leave it."""
        flow = self.looks_at(context)
        search = _Search(self.options, context, Samples(context.stream, flow))
        context.show(search, flow, "clip")
        return StepPlan(clips=search.found)

    def looks_at(self, context: Context) -> Flow:
        """A batch says enough of a range: its tokens are what differs."""
        return context.drawn("steps.clip", context.batch_size)

    def plan_block(self, block: Block, context: Context, flow: Flow | None) -> StepPlan:
        """Searches the inputs of the block's Linears."""
        if flow is None:
            raise TypeError("clip looks at samples")
        search = _Search(self.options, context, Samples(context.stream, flow))
        search.enter(block)
        return StepPlan(clips=search.found)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Leaves the weights alone: the plan is what solvers read."""


def _searched(spec: QuantSpec | None) -> bool:
    return spec is not None and spec.affine and spec.range not in OWN_SEARCH


class _Search:
    """The visitor that measures output errors; the inputs of a stage share one ratio."""

    def __init__(self, options: Options, context: Context, samples: Samples):
        self.options, self.context, self.samples = options, context, samples
        self.found: dict[str, float] = {}

    def enter(self, block: Block) -> None:
        """Lets the samples pass, then chooses the ratios of the block's inputs."""
        stages = [names for stage in self.context.stages(block) if (names := self._names(stage))]
        rows = {names[0]: Rows(SEARCH_VALUES, self.samples.tokens) for names in stages}
        if rows:
            self.samples.carry(block, {name: kept.add for name, kept in rows.items()})
        for names in stages:
            if not rows[names[0]].empty:
                ratio = self._ratio(names, rows[names[0]].kept())
                self.found |= dict.fromkeys(names, ratio)

    def leave(self, block: Block) -> None:
        """Does nothing."""

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the block's ratios."""
        StepPlan(clips={name: self.found[name] for name in block.linears if name in self.found}).save(path)

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up what `write` has written."""
        self.found |= StepPlan.load(path, self.context.stream.device).clips

    def _names(self, stage: tuple[str, ...]) -> list[str]:
        """Returns the Linears of a stage whose input is searched: those with the spec of the first such."""
        searched = {name: spec for name in stage if _searched(spec := specs_of(self.context, name).input)}
        return [name for name, spec in searched.items() if spec == next(iter(searched.values()))]

    def _ratio(self, names: list[str], rows: torch.Tensor) -> float:
        spec = specs_of(self.context, names[0]).input
        if spec is None:
            return 1.0
        weights = [weight_of(self.context.module(name)) for name in names]
        labels = labels_of(self.context, names[0], spec, "input")
        ranges = None if spec.dynamic else ChannelStatistics.empty(rows.shape[1], rows.device)
        if ranges is not None:
            ranges.update(rows)

        def fake(x: torch.Tensor, ratio: float) -> torch.Tensor:
            clipped = replace(spec, clip=ratio, range="minmax")
            if ranges is None:
                return fake_quantize_dynamic(x, clipped)
            rounded: torch.Tensor = InputQuantizer(clipped, (ranges.min, ranges.max), labels)(x)
            return rounded

        ratios = self.options.ratios
        descending = all(a > b for a, b in pairwise(ratios))
        return input_clip_ratio(weights, rows, fake, ratios, DEARER if descending else math.inf)[0]
