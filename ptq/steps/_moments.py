"""Second moments of what the Linears of a stage read now, for solvers that weigh errors by them."""

from collections.abc import Callable
from functools import partial

import torch

from ptq.errors import UserError
from ptq.network.network import Block, weight_of
from ptq.ranks.reduction import merged, total_of
from ptq.ranks.sample_sum import SampleSum, by_sample
from ptq.steps._solving import BlockInputs, specs_of
from ptq.steps._step import Context
from quantize.modules.simulated import InputQuantizer
from quantize.solvers.gptq import Hessian


def stage_hessians(
    context: Context, block: Block, stage: tuple[str, ...], inputs: BlockInputs
) -> dict[str, torch.Tensor]:
    """Returns H = 2 X^T X / n, float32 (in, in), by full name of each Linear of a stage whose weight is quantized.

    X is what the Linear reads now, on all calibration samples, rounded as its input will be. Linears with one input share
    one tensor.

    Raises:
        UserError: when no samples were drawn.
    """
    if context.samples is None:
        raise UserError("calibration: a solver needs calibration samples, and none were drawn")
    of: dict[str, InputQuantizer | None] = {}
    for name in stage:
        specs = specs_of(context, name)
        if specs.weight is not None:
            of[name] = inputs.of(name, specs)
    flow, world = context.samples.flow, context.samples.stream.world
    found: dict[InputQuantizer | None, SampleSum[Hessian]] = {}
    empty: dict[InputQuantizer | None, Callable[[], Hessian]] = {}
    for name, quantizer in of.items():
        if quantizer not in found:
            weight = weight_of(context.module(name))
            empty[quantizer] = partial(Hessian, weight.shape[1], weight.device)
            found[quantizer] = SampleSum(flow.leaf, empty[quantizer], merged)
    if found:
        context.samples.feed(block, {next(iter(of)): partial(_see, found, flow.ids.shape[1])}, shared=True)
    matrices = {}
    for quantizer, mine in found.items():
        total = total_of(world, mine, Hessian.from_state, context.samples.stream.device)
        matrices[quantizer] = (empty[quantizer]() if total is None else total).matrix
    return {name: matrices[quantizer] for name, quantizer in of.items()}


def _see(sums: dict[InputQuantizer | None, SampleSum[Hessian]], length: int, x: torch.Tensor, tokens: slice) -> None:
    """Adds a batch, a sample at a time, so that sums do not depend on the batch size."""
    if not x.numel():
        return
    for quantizer, summed in sums.items():
        # Rounded before samples lie one after another: a range is a sample's own.
        y = x if quantizer is None else quantizer(x)
        rows = y.reshape(-1, y.shape[-1])
        for sample, of in by_sample(y, slice(tokens.start // length, tokens.stop // length)):
            summed.of(sample).update(rows[of])
