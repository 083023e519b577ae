"""What the candidate formats make of a block's weights: rounded to nearest, or as the recipe's solver would choose them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ptq.calibration.samples import Samples
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import linear_specs
from ptq.network.block_stream import Flow
from ptq.network.experts.abreast import abreast
from ptq.network.network import Block, weight_of
from ptq.ranks.sample_sum import sums_held
from ptq.steps._moments import block_hessians
from ptq.steps._solving import BlockInputs
from ptq.steps._step import Context, Solver
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec

Weights = dict[str, dict[str, torch.Tensor]]
"""By full name of a Linear and by format its quantized weight, float32 (out, in)."""
Quantize = Callable[[Block], Weights]
"""From a block whose weights are in memory to the weights of its Linears."""


def chosen(scheme: SchemeConfig, block: Block) -> list[str]:
    """Returns the Linears of a block whose weights the scheme quantizes, in order."""
    return [name for name in block.linears if linear_specs(scheme, name).weight is not None]


def to_nearest(context: Context, formats: Mapping[str, QuantSpec]) -> Quantize:
    """Returns what rounds every weight to nearest."""

    def quantize(block: Block) -> Weights:
        return {name: nearest(weight_of(context.module(name)), formats) for name in chosen(context.scheme, block)}

    return quantize


def solved_by(
    context: Context, formats: Mapping[str, QuantSpec], solver: Solver, flow: Flow, inputs: Sequence[torch.Tensor]
) -> Quantize:
    """Returns what quantizes weights as `solver` does, on the Hessians of what the unquantized block's Linears read.

    Args:
        context: of the transforms.
        formats: by name.
        solver: weighs errors.
        flow: of the samples that Hessians are of.
        inputs: what of them reaches each block.

    Linears with one input are solved as one tall weight where their rows have grids of their own. One that no token reaches is
    rounded to nearest.
    """
    stacked = all(spec.affine and spec.granularity != "tensor" for spec in formats.values())

    def quantize(block: Block) -> Weights:
        context.samples = Samples(context.stream, replace(flow, hidden=inputs[block.index], finite={}, ahead={}))
        quantizers = BlockInputs(context, block)
        found: Weights = {}
        for stages in abreast(block, context.stages(block), sums_held(len(flow.hidden))):
            hessians = block_hessians(context, block, stages, quantizers)
            for names in _together(hessians, stacked):
                weights = [weight_of(context.module(name)).float() for name in names]
                tall = torch.cat(weights)
                hessian = hessians[names[0]]
                made = solver.quantized(tall, hessian, formats) if hessian.any() else nearest(tall, formats)
                parts = {form: weight.split([len(w) for w in weights]) for form, weight in made.items()}
                found |= {name: {form: part[i] for form, part in parts.items()} for i, name in enumerate(names)}
        return found

    return quantize


def nearest(weight: torch.Tensor, formats: Mapping[str, QuantSpec]) -> dict[str, torch.Tensor]:
    """Returns by format a weight (out, in) rounded to nearest, float32."""
    return {form: codec_of(spec).fake_weight(weight.float(), spec) for form, spec in formats.items()}


def _together(hessians: Mapping[str, torch.Tensor], stacked: bool) -> list[list[str]]:
    """Returns the Linears that are solved at once: those with one Hessian where they can be `stacked`."""
    groups: dict[int, list[str]] = {}
    for number, (name, hessian) in enumerate(hessians.items()):
        groups.setdefault(id(hessian) if stacked else number, []).append(name)
    return list(groups.values())
