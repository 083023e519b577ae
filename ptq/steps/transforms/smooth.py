"""SmoothQuant (Xiao et al. 2022): scale migrates from a link's activation into the weights that read it."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from ptq.calibration.samples import Samples
from ptq.calibration.statistics import ChannelStatistics, WeightStatistics
from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.network.block_stream import Flow
from ptq.network.links import Link
from ptq.network.network import Block, weight_of
from ptq.network.norms import gain_offset
from ptq.steps._solving import Rows, specs_of
from ptq.steps._step import RESIDUAL, STATISTICS, WEIGHT_INPUT, WEIGHT_OUTPUT, Context, StepPlan, Transform
from quantize.codecs.registry import codec_of
from quantize.kernels.matmul import product
from quantize.modules.online import online_input
from quantize.modules.simulated import InputQuantizer, fake_quantize_dynamic
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.smooth import divide_norm, divide_rows, multiply_columns, shared_scale, smoothing_scale

KINDS = ("fc1_fc2", "up_down", "v_o", "norm")
"""Kinds of links, in the order in which a block is smoothed: v's new rows are among the weights that read the norm."""
SEARCH_VALUES = 1 << 20
"""Numbers of one link's tensor on which the search measures output errors."""
TRIAL_TOKENS = 384
"""Tokens that a trial of smoothing rounds, about: its candidates differ by far more than what other tokens would say."""
TRIAL_OUTPUTS = 384
"""Outputs of all readers of a link that a trial of smoothing multiplies, about: evenly spaced rows of their weights."""


@dataclass(frozen=True)
class Options:
    """How far scale migrates.

    Attributes:
        alpha: migration strength of METHODS.md section 3: the exponent of the activations; 1 evens them out.
        beta: the exponent of the weights; null for SmoothQuant's 1 - alpha. `alpha` 0 with `beta` 0.5 evens out the columns of
            the weights, which is what GPTQ gains from most where inputs are left alone or have 8 bits.
        search: choose alpha for each link among `candidates` by the error of the outputs of the Linears that read it,
            on the first batch of calibration samples; a link where nothing helps is left alone.
        candidates: alphas that the search tries.
        links: kinds of links to smooth, of ``norm``, ``v_o``, ``up_down`` and ``fc1_fc2`` (ReLU only); null for all
            that the model has and that are exact.
    """

    alpha: float = option(0.5, only_with={"search": (False,)})
    beta: float | None = None
    search: bool = False
    candidates: tuple[float, ...] = option((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), only_with={"search": (True,)})
    links: tuple[str, ...] | None = option(None, choices=KINDS)

    def __post_init__(self) -> None:
        exponents = [("alpha", self.alpha), *(("candidates", alpha) for alpha in self.candidates)]
        for name, exponent in exponents if self.beta is None else [*exponents, ("beta", self.beta)]:
            if not 0 <= exponent <= 1:
                close = min(max(exponent, 0.0), 1.0)
                raise UserError(f"steps.smooth.{name}: {exponent} is not between 0 and 1 (nearest: {close})")
        if self.search and not self.candidates:
            raise UserError("steps.smooth.candidates: empty, but search is true: list alphas such as [0.3, 0.5, 0.7]")


class Step(Transform):
    """Divides what a link's producer writes by a scale per channel, and multiplies the columns that read it."""

    acts: ClassVar[frozenset[str]] = frozenset({WEIGHT_INPUT, WEIGHT_OUTPUT})
    by_block: ClassVar[bool] = True

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the channel statistics of every link."""
        return frozenset({STATISTICS})

    def warned(self, scheme: SchemeConfig, acted: frozenset[str]) -> str | None:
        """Says so of the formula after a rotation of the residual stream."""
        if self.options.search or RESIDUAL not in acted:
            return None
        return (
            "smooth: its formula goes by the greatest magnitudes of channels, which a rotation of the stream has made alike, and was "
            "found to hurt after one (arXiv 2507.17417): search=true tries it by output error, ~steps.smooth leaves it out"
        )

    def plan(self, context: Context) -> StepPlan:
        """Chooses the scale of every link, and rewrites the statistics of what it touches."""
        planning = Formula(self.options, context)
        if not self.options.search:
            for block in context.network.blocks:
                with context.shown(block):
                    planning.choose(block, None)
        else:
            search(planning, "smooth")
        return StepPlan(planning.scales, statistics=planning.statistics)

    def looks_at(self, context: Context) -> Flow | None:
        """What the search looks at."""
        return searched(context, "smooth") if self.options.search else None

    def plan_block(self, block: Block, context: Context, flow: Flow | None) -> StepPlan:
        """Chooses the scales of the block's links."""
        return planned(Formula(self.options, context), block, flow)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Rescales the block's links, in place."""
        rescale(block, plan.tensors, context)


@torch.no_grad()
def rescale(block: Block, scales: Mapping[str, torch.Tensor], context: Context) -> None:
    """Divides what the producers of a block's links write by `scales`, by `key_of`, and multiplies the columns that read it."""
    for link in _in_order(context, block):
        scale = scales.get(key_of(link))
        if scale is None:
            continue
        producer = context.module(link.source or link.producer)
        if link.kind == "norm":
            divide_norm(producer.weight, getattr(producer, "bias", None), scale, gain_offset(producer) or 0.0)
        else:
            divide_rows(weight_of(producer), producer.bias, scale)
        for reader in link.readers:
            multiply_columns(weight_of(context.module(reader)), link.reader_scale(scale))


def search(planning: "Planning", name: str) -> None:
    """Lets `planning` choose the scales of every block, on the first batch of the calibration samples."""
    flow = searched(planning.context, name)
    planning.context.show(ScaleSearch(planning, Samples(planning.context.stream, flow)), flow, name)


def searched(context: Context, name: str) -> Flow:
    """Returns what the step `name` searches on: the first batch of the calibration samples."""
    return context.drawn(f"steps.{name}", context.batch_size)


def planned(planning: "Planning", block: Block, flow: Flow | None) -> StepPlan:
    """Returns what `planning`, which has seen no other block, chooses for a block, on the samples of `flow` where it searches."""
    if flow is None:
        planning.choose(block, None)
    else:
        ScaleSearch(planning, Samples(planning.context.stream, flow)).enter(block)
    return planning.of_block(block)


def key_of(link: Link) -> str:
    """Returns the name of a link's scale in the plan."""
    return f"{link.producer}|{link.readers[0]}"


def links_of(asked: Sequence[str] | None, context: Context, block: Block, name: str = "smooth") -> Iterator[Link]:
    """Yields the links of `block` that the step `name` rescales, in order, of the kinds `asked` (None: all); notes what
    cannot be rescaled, and why.
    """
    roles = context.roles
    for link in _in_order(context, block):
        kind = kind_of(link, roles)
        if asked is not None and kind not in asked:
            continue
        reason = _reason(link, kind, context)
        if reason and asked is not None:
            raise UserError(f"steps.{name}.links: {kind} of {link.producer}: {reason}: leave {kind} out")
        if reason:
            context.note(f"{name}: {link.producer} left alone: {reason}")
        else:
            yield link


def _in_order(context: Context, block: Block) -> list[Link]:
    """Returns the links of `block` that can be smoothed, in the order of `KINDS`."""
    roles = context.roles
    kinds = {link: kind_of(link, roles) for link in context.links(block)}
    return sorted((link for link, kind in kinds.items() if kind), key=lambda link: KINDS.index(kinds[link]))


def _reason(link: Link, kind: str, context: Context) -> str:
    """Returns why the link cannot be smoothed exactly, or ""."""
    if between := [name for name in link.readers if online_input(context.module(name)) is not None]:
        return f"a step before acts online on what {between[0]} reads"
    module = context.module(link.producer)
    if kind == "fc1_fc2" and not link.homogeneous:
        return f"{type(module).__name__} does not commute with positive scales as ReLU does"
    if kind == "norm" and gain_offset(module) is None:
        return f"{type(module).__name__} multiplies by neither w nor 1 + w"
    return ""


class Planning:
    """Gathers the scales, and what they make of the statistics. A subclass may choose scales otherwise, by `scale`.

    Args:
        name: the step's, for what it says.
        links: kinds of links to rescale; None for all.
        context: what the step sees.
    """

    def __init__(self, name: str, links: Sequence[str] | None, context: Context):
        if context.statistics is None:
            raise UserError(f"steps.{name}: needs calibration statistics, and none were taken")
        self.name, self.kinds, self.context = name, links, context
        self.statistics = context.statistics.copy()
        self.scales: dict[str, torch.Tensor] = {}

    def links(self, block: Block) -> list[Link]:
        """Returns the links of `block` to smooth, in order."""
        return list(links_of(self.kinds, self.context, block, self.name))

    def of_block(self, block: Block) -> StepPlan:
        """Returns what has been chosen for one block."""
        keys = map(key_of, _in_order(self.context, block))
        scales = {key: self.scales[key] for key in keys if key in self.scales}
        return StepPlan(scales, statistics=self.statistics.of_linears(block.readers))

    def add(self, chosen: StepPlan) -> None:
        """Takes up what had been chosen for one block."""
        self.scales |= chosen.tensors
        if chosen.statistics is not None:
            self.statistics.inputs.update(chosen.statistics.inputs)
            self.statistics.weights.update(chosen.statistics.weights)

    def choose(self, block: Block, rows: dict[str, torch.Tensor] | None) -> None:
        """Chooses the scales of a block whose weights are in memory, on these rows of its links' tensors where alpha is searched.

        A link that no token reaches, as an expert's may be, stays as it is, and the run's log says so.
        """
        inputs, weights = self.statistics.inputs, self.statistics.weights
        working: dict[str, torch.Tensor] = {}

        def weight(name: str) -> torch.Tensor:
            if name not in working:
                working[name] = weight_of(self.context.module(name)).detach().clone()
            return working[name]

        for link in self.links(block):
            first = link.readers[0]
            if first not in inputs or (rows is not None and first not in rows):
                self.context.note(f"{self.name}: {link.producer} left alone: no token reaches {first}")
                continue
            readers = [weight(name) for name in link.readers]
            scale = self.scale(link, inputs[first], readers, None if rows is None else rows[first])
            back = link.reader_scale(scale)
            self.scales[key_of(link)] = scale
            for name in link.readers:
                multiply_columns(weight(name), back)
                if name in inputs:
                    inputs[name] = inputs[name].divided(back)
            if link.kind != "norm":
                divide_rows(weight(link.source or link.producer), None, scale)
        for name, tensor in working.items():
            weights[name] = WeightStatistics.of(tensor)

    def scale(
        self, link: Link, statistics: ChannelStatistics, readers: Sequence[torch.Tensor], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the scale of a link, on the statistics and the `rows` (tokens, channels) of its tensor and its readers' weights."""
        raise TypeError(f"{type(self).__name__} does not say how it chooses a scale")


class Formula(Planning):
    """SmoothQuant's formula, alpha given or searched."""

    def __init__(self, options: Options, context: Context):
        super().__init__("smooth", options.links, context)
        self.options = options

    def scale(
        self, link: Link, statistics: ChannelStatistics, readers: Sequence[torch.Tensor], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the formula's scale, or the best of the candidates and of none where alpha is searched."""
        columns = torch.stack([w.abs().amax(0).float() for w in readers]).amax(0)
        activation, columns = (
            shared_scale(x.to(columns), link.repeat, link.head_dim) for x in (statistics.absmax, columns)
        )
        if rows is None:
            return smoothing_scale(activation, columns, self.options.alpha, self.options.beta)
        specs = specs_of(self.context, _of_linear(link, self.context))
        trial = self.trial(rows, readers, _clusterless(specs.weight), specs.input, statistics)
        scales = [torch.ones_like(columns)]
        scales += [smoothing_scale(activation, columns, alpha, self.options.beta) for alpha in self.options.candidates]
        errors = [trial.error(link.reader_scale(scale)) for scale in scales]
        return scales[min(range(len(errors)), key=errors.__getitem__)]

    def trial(
        self,
        rows: torch.Tensor,
        readers: Sequence[torch.Tensor],
        weight: QuantSpec | None,
        input: QuantSpec | None,
        statistics: ChannelStatistics,
    ) -> "Trial":
        """Returns what measures the candidates of one link: see `Trial.of`."""
        return Trial.of(rows, readers, weight, input, statistics)


class ScaleSearch:
    """The visitor that shows the planning some tokens of every link of a block."""

    def __init__(self, planning: Planning, samples: Samples):
        self.planning, self.samples = planning, samples

    def enter(self, block: Block) -> None:
        """Lets the samples pass once, then chooses the block's scales."""
        names = [link.readers[0] for link in self.planning.links(block)]
        kept = {name: Rows(SEARCH_VALUES, self.samples.tokens) for name in names}
        if names:
            self.samples.carry(block, {name: rows.add for name, rows in kept.items()})
        self.planning.choose(block, {name: rows.kept() for name, rows in kept.items() if not rows.empty})

    def leave(self, block: Block) -> None:
        """Does nothing."""

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the block's scales, and its Linears' statistics as they leave them."""
        self.planning.of_block(block).save(path)

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up what `write` has written."""
        device = self.planning.context.stream.device
        self.planning.add(StepPlan.load(path, device))


@dataclass(frozen=True)
class Trial:
    """Measures what quantization does to the outputs of a link's readers when the link is rescaled.

    Evenly spaced tokens and evenly spaced outputs stand for all. What shares a scale is rounded whole, so that each of them is rounded
    as it will be.

    Attributes:
        rows: tokens of the link's tensor that are rounded together, (tokens, in).
        tokens: which of them are multiplied.
        readers: weights that are rounded together, each (out, in).
        outputs: which of their rows are multiplied.
        exact: what those tokens and rows give unquantized, each (tokens, outputs).
        weight: format of the weights; None leaves them alone.
        input: format of the input; None leaves it alone.
        statistics: of the link's tensor, for static ranges.
    """

    rows: torch.Tensor
    tokens: slice
    readers: Sequence[torch.Tensor]
    outputs: slice
    exact: Sequence[torch.Tensor]
    weight: QuantSpec | None
    input: QuantSpec | None
    statistics: ChannelStatistics

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        readers: Sequence[torch.Tensor],
        weight: QuantSpec | None,
        input: QuantSpec | None,
        statistics: ChannelStatistics,
        tokens: int = TRIAL_TOKENS,
        outputs: int = TRIAL_OUTPUTS,
    ) -> Self:
        """Returns the trial on about so many `tokens` and `outputs` of `rows` (tokens, in) and `readers`, each (out, in)."""
        # An odd step: the first tokens of windows, whose lengths are even, are seen as often as others.
        chosen = slice(None, None, max(1, len(rows) // tokens) | 1)
        kept = slice(None, None, max(1, sum(map(len, readers)) // outputs))
        if input is None or not input.dynamic or not codec_of(input).couples_tokens(input):
            rows, chosen = rows[chosen].contiguous(), slice(None)
        if weight is None or not codec_of(weight).couples_tokens(weight):
            readers, kept = [reader[kept].contiguous() for reader in readers], slice(None)
        exact = [product(rows[chosen], reader[kept].t()) for reader in readers]
        return cls(rows, chosen, readers, kept, exact, weight, input, statistics)

    def error(self, scale: torch.Tensor) -> float:
        """Returns the squared error of the outputs for `scale` (in,)."""
        x = self._input(self.rows / scale, scale)[self.tokens]
        total = 0.0
        for weight, exact in zip(self.readers, self.exact, strict=True):
            scaled = weight * scale
            if self.weight is not None:
                scaled = codec_of(self.weight).fake_weight(scaled, self.weight)
            total += float((exact - product(x, scaled[self.outputs].t())).square_().sum())
        return total

    def _input(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.input is None:
            return x
        if self.input.dynamic:
            return fake_quantize_dynamic(x, self.input)
        ranges = self.statistics.divided(scale)
        labels = alike(ranges.absmax) if self.input.granularity == "cluster" else None
        quantized: torch.Tensor = InputQuantizer(self.input, (ranges.min, ranges.max), labels)(x)
        return quantized


def alike(magnitudes: torch.Tensor) -> torch.Tensor:
    """Returns labels, int64 (channels,), of channels whose greatest magnitudes lie between the same powers of two.

    What lies 2^20 below the greatest, or further, is alike. Stands for the clusters that are made after smoothing: ranges
    that differ by more than a factor of two will not share one.
    """
    floor = magnitudes.max() * 2.0**-20
    octaves = magnitudes.float().clamp_min(floor.clamp_min(torch.finfo(torch.float32).tiny)).log2().floor()
    return octaves.unique(return_inverse=True)[1]


def _clusterless(spec: QuantSpec | None) -> QuantSpec | None:
    """Returns the spec that a trial uses for weights: one range a row, where there will be one a row and cluster."""
    clustered = spec is not None and spec.granularity == "cluster"
    return replace(spec, granularity="channel") if clustered and spec is not None else spec


def _of_linear(link: Link, context: Context) -> str:
    """Returns the first reader that is quantized: gates stay in floating point."""
    linears = context.network.blocks[link.block].linears
    return next((name for name in link.readers if name in linears), link.readers[0])


def kind_of(link: Link, roles: dict[str, str]) -> str:
    """Returns ``norm``, ``fc1_fc2``, ``v_o`` or ``up_down``; "" for a link that no transform can use."""
    if link.kind == "norm":
        return "norm"
    if link.kind == "activation":
        return "fc1_fc2" if link.source else ""
    return "v_o" if roles.get(link.producer) == "value" or link.repeat > 1 else "up_down"
