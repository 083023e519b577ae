"""AWQ (Lin et al. 2023): a scale per channel of each link, by the output error of the Linears that read it, saves what the
greatest activations multiply from rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ptq.calibration.statistics import ChannelStatistics
from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError
from ptq.network.block_stream import Flow
from ptq.network.links import Link
from ptq.network.network import Block
from ptq.steps._solving import specs_of
from ptq.steps._step import STATISTICS, WEIGHT_INPUT, WEIGHT_OUTPUT, Context, StepPlan, Transform
from ptq.steps.transforms.smooth import KINDS, Planning, planned, rescale, search, searched
from quantize.codecs.registry import codec_of
from quantize.solvers.awq import RATIOS, awq_scale, scale_of
from quantize.solvers.gptq import Hessian
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.smooth import shared_scale


@dataclass(frozen=True)
class Options:
    """What the search tries.

    Attributes:
        ratios: exponents r of the mean magnitude, 0 (no scale) to 1.
        links: kinds of links to rescale, of ``norm``, ``v_o``, ``up_down`` and ``fc1_fc2`` (ReLU only); null for all that
            the model has and that are exact.
    """

    ratios: tuple[float, ...] = option(RATIOS, least=0, most=1)
    links: tuple[str, ...] | None = option(None, choices=KINDS)

    def __post_init__(self) -> None:
        if not self.ratios:
            raise UserError("steps.awq.ratios: empty: list exponents such as [0.0, 0.25, 0.5]")


class Step(Transform):
    """Divides what a link's producer writes by the scale that serves its readers best, and multiplies their columns."""

    acts: ClassVar[frozenset[str]] = frozenset({WEIGHT_INPUT, WEIGHT_OUTPUT})
    by_block: ClassVar[bool] = True

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the statistics, which it rewrites. `UserError` where no weight is quantized: there is no error to go by."""
        if not tensor_specs(scheme, "weight"):
            raise UserError("scheme.weight: null, but steps.awq goes by what rounding does to weights: ~steps.awq")
        return frozenset({STATISTICS})

    def plan(self, context: Context) -> StepPlan:
        """Searches the scale of every link on the first batch of the calibration samples."""
        planning = _Planning(self.options, context)
        search(planning, "awq")
        return StepPlan(planning.scales, statistics=planning.statistics)

    def looks_at(self, context: Context) -> Flow:
        """What the search looks at."""
        return searched(context, "awq")

    def plan_block(self, block: Block, context: Context, flow: Flow | None) -> StepPlan:
        """Searches the scales of the block's links."""
        return planned(_Planning(self.options, context), block, flow)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Rescales the block's links, in place."""
        rescale(block, plan.tensors, context)


class _Planning(Planning):
    """Chooses scales by AWQ's search, rounding to nearest on plain ranges; clips come after it, by the solver."""

    def __init__(self, options: Options, context: Context):
        super().__init__("awq", options.links, context)
        self.ratios = options.ratios

    def scale(
        self, link: Link, statistics: ChannelStatistics, readers: Sequence[torch.Tensor], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the scale (channels of the producer,); of heads that share a value the greatest magnitude counts."""
        mean = statistics.absmax if rows is None else rows.abs().float().mean(0)
        mean = shared_scale(mean, link.repeat, link.head_dim)
        spec = specs_of(self.context, link.readers[0]).weight
        if spec is None or rows is None:
            return torch.ones_like(mean)
        hessian = Hessian(rows.shape[1], rows.device)
        hessian.update(rows)
        plain = _plain(spec)
        found = awq_scale(
            link.reader_scale(mean),
            readers,
            hessian.matrix,
            lambda weight, scaled: codec_of(plain).fake_weight(weight, plain),
            self.ratios,
        )
        return scale_of(mean, found.ratio)


def _plain(spec: QuantSpec) -> QuantSpec:
    """Returns the spec of the trial: minimum to maximum, one range a row where there will be one a row and cluster."""
    if not spec.affine:
        return spec
    return replace(spec, range="minmax", granularity="channel" if spec.granularity == "cluster" else spec.granularity)
