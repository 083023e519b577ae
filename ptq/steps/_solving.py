"""What every solver does: input quantizers shared by the Linears of a stage, and the quantized Linear in the old one's place."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ptq.config.schema import SchemeConfig
from ptq.config.scheme import LinearSpecs, linear_specs, tensor_specs
from ptq.errors import UserError
from ptq.network.network import Block, replace_module, weight_of
from ptq.steps._step import SAMPLES, STATISTICS, Context
from quantize.codecs.base import Encoded
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, dequantize, grouped
from quantize.grid.ranges import RunningRange, observed_grid
from quantize.modules.online import carry_online
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.solvers.lowrank import Factors
from quantize.solvers.tiles.block_feedback import has_tiles
from quantize.spec.quant_spec import QuantSpec

Solved = tuple[torch.Tensor, Grid] | Encoded
"""What a solver chose for a weight: codes (out, in) on an integer grid, or what `Codec.encode` would give for its format."""
WITHOUT_LEVELS = ("q8_0", "q8_0_gguf", "llm_int8")
"""Formats that are rounded by a rule of their own."""
OBSERVED_VALUES = 1 << 21
"""Numbers of one tensor that the percentile and mse estimators look at: evenly spaced tokens of all samples."""


class BlockInputs:
    """Gives the Linears of a block that read one tensor with one spec the same `InputQuantizer`: it is rounded once."""

    def __init__(self, context: Context, block: Block):
        self._context, self._block = context, block
        self._stage = {name: i for i, stage in enumerate(context.stages(block)) for name in stage}
        self._made: dict[tuple[int, QuantSpec], InputQuantizer | None] = {}

    def of(self, name: str, specs: LinearSpecs) -> InputQuantizer | None:
        """Returns the quantizer of the input of the Linear `name`, or None where the scheme leaves it alone, or no token of
        the calibration samples reaches it that a static range could be fitted to; the run's log says that.
        """
        if specs.input is None:
            return None
        key = (self._stage[name], specs.input)
        if key not in self._made:
            self._made[key] = self._make(name, specs.input)
        return self._made[key]

    def _make(self, name: str, spec: QuantSpec) -> InputQuantizer | None:
        context, labels = self._context, labels_of(self._context, name, spec, "input")
        if spec.dynamic:
            return InputQuantizer(spec)
        if spec.range == "minmax":
            if context.statistics is None:
                raise UserError(f"scheme.input.dynamic: false for {name} needs calibration statistics: none were taken")
            statistics = context.statistics.inputs.get(name)
            if statistics is None:
                self._note_unreached(name)
                return None
            return InputQuantizer(spec, (statistics.min, statistics.max), labels)
        if context.samples is None:
            raise UserError(f"scheme.input.range: {spec.range!r} for {name} needs calibration samples: none were taken")
        if spec.range == "ema":
            running, length = RunningRange(), context.samples.flow.ids.shape[1]
            context.samples.feed(
                self._block, {name: lambda x, tokens: running.update_all(x.reshape(-1, length, x.shape[-1]))}
            )
            if running.minimum is None:
                self._note_unreached(name)
                return None
            return InputQuantizer(spec, running.range(), labels)
        rows = Rows(OBSERVED_VALUES, context.samples.tokens)
        context.samples.feed(self._block, {name: rows.add})
        if rows.empty:
            self._note_unreached(name)
            return None
        return InputQuantizer(spec, None, labels, observed_grid(rows.kept(), spec, labels))

    def _note_unreached(self, name: str) -> None:
        self._context.note(f"{name}: no calibration token reaches it: its input stays in floating point")


class Rows:
    """Keeps evenly spaced tokens of what passes, at most about `values` numbers in all of `tokens` tokens.

    Which tokens depends on their place among all, so that ranks keep of their batches what one rank keeps of them. Of a tensor that
    has not all tokens, as an expert's, the first of each batch is kept, and others after it.
    """

    def __init__(self, values: int, tokens: int):
        self._values, self._tokens = values, tokens
        self._kept: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, tokens: slice) -> None:
        """Keeps some rows of `x` (..., channels); a watcher of `Samples`."""
        rows = x.reshape(-1, x.shape[-1])
        every = max(1, self._tokens * rows.shape[1] // self._values)
        first = -tokens.start % every if len(rows) == tokens.stop - tokens.start else 0
        self._kept.append(rows[first::every].clone())

    @property
    def empty(self) -> bool:
        """Whether no row has passed."""
        return not any(len(rows) for rows in self._kept)

    def kept(self) -> torch.Tensor:
        """Returns the rows that were kept (rows, channels)."""
        return torch.cat(self._kept)


def specs_of(context: Context, name: str) -> LinearSpecs:
    """Returns what the scheme says of the Linear `name`, its input's range clipped as the plans say."""
    specs, share = linear_specs(context.scheme, name), context.clips.get(name)
    if specs.input is None or share is None:
        return specs
    return replace(specs, input=replace(specs.input, clip=share))


def quantize_linear(
    context: Context,
    name: str,
    specs: LinearSpecs,
    inputs: InputQuantizer | None,
    solve: Callable[[torch.Tensor], Solved] | None = None,
    correction: Factors | None = None,
) -> QuantLinear:
    """Puts the quantized Linear in the place of the Linear `name`, and returns it.

    Args:
        context: what the step sees.
        name: full name of the Linear.
        specs: its formats.
        inputs: the quantizer of its input.
        solve: gives what is stored of a weight (out, in); None rounds to nearest.
        correction: of low rank, added to what is stored.

    Raises:
        UserError: for NaN or inf in the weight, or a scheme that does not fit it.
    """
    module: nn.Module = context.network.model.get_submodule(name)
    weight, labels = weight_of(module), labels_of(context, name, specs.weight, "weight")
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    try:
        solved = solve(weight) if solve is not None and specs.weight is not None else (None, None)
        if isinstance(solved, tuple):
            quantized = QuantLinear(weight, bias, specs.weight, inputs, solved[1], solved[0], labels)
        else:
            quantized = QuantLinear(weight, bias, specs.weight, inputs, stored=solved)
        if correction is not None:
            quantized.correct(correction.left, correction.right)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    carry_online(module, quantized)
    replace_module(context.network.model, name, quantized)
    context.replaced(name, module, quantized)
    return quantized


def values_of(solved: Solved, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
    """Returns the weight (out, in), float32, that a solver has chosen, in a format without clusters."""
    if isinstance(solved, tuple):
        return dequantize(grouped(solved[0], spec), solved[1]).reshape(*shape)
    return codec_of(spec).decode(solved, spec, shape)


def labels_of(context: Context, name: str, spec: QuantSpec | None, tensor: str) -> torch.Tensor | None:
    """Returns the cluster of each input channel of the Linear `name` where `spec` asks for clusters, else None."""
    if spec is None or spec.granularity != "cluster":
        return None
    if name not in context.labels:
        raise UserError(
            f"scheme.{tensor}.granularity: 'cluster', but no step clusters the input of {name}: "
            f"add steps.cluster, or an override with granularity tensor for it"
        )
    return context.labels[name]


def captures_of(scheme: SchemeConfig) -> frozenset[str]:
    """Returns what static ranges need: statistics for inputs by minmax; the samples for other estimators, and for query,
    key and value, which no Linear reads.
    """
    ranges = {spec.range for spec in tensor_specs(scheme, "input") if not spec.dynamic}
    wanted = {STATISTICS} if "minmax" in ranges else set()
    watched = any(not spec.dynamic for tensor in ("query", "key", "value") for spec in tensor_specs(scheme, tensor))
    return frozenset(wanted | ({SAMPLES} if watched or ranges - {"minmax"} else set()))


def refuse_without_levels(scheme: SchemeConfig, option: str, tiles: bool = False) -> None:
    """Raises `UserError` when a weight's format is rounded by a rule of its own, and the step's `option` needs levels, or `tiles`."""
    for spec in tensor_specs(scheme, "weight"):
        if spec.format in WITHOUT_LEVELS or (has_tiles(spec) and not tiles):
            raise UserError(
                f"scheme.weight.format: {spec.format!r} has no levels and scales alone for steps.{option} to choose among: "
                f"use int with granularity group, or steps.rtn={{}}"
            )


def require_integers(scheme: SchemeConfig, step: str) -> None:
    """Raises `UserError` when a weight is of another format than int, whose ranges are what `step` finds."""
    for spec in tensor_specs(scheme, "weight"):
        if not spec.affine:
            raise UserError(
                f"scheme.weight.format: {spec.format!r} has no ranges for steps.{step} to find: use int, or steps.gptq={{}}"
            )
