"""Second moments of what the Linears of a stage read now, for solvers that weigh errors by them."""

from functools import partial

import torch

from ptq.errors import UserError
from ptq.network.network import Block, weight_of
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
    found: dict[InputQuantizer | None, Hessian] = {}
    for name, quantizer in of.items():
        if quantizer not in found:
            weight = weight_of(context.module(name))
            found[quantizer] = Hessian(weight.shape[1], weight.device)
    if found:
        context.samples.feed(block, {next(iter(of)): partial(_see, found)})
    matrices = {quantizer: hessian.matrix for quantizer, hessian in found.items()}
    return {name: matrices[quantizer] for name, quantizer in of.items()}


def samples_of(x: torch.Tensor) -> list[slice]:
    """Returns which rows of ``x.reshape(-1, channels)`` are each sample's; those of a tensor (tokens, channels) are one's."""
    length = x.shape[1:-1].numel() if x.dim() > 2 else len(x)
    return [slice(start, start + length) for start in range(0, x.shape[:-1].numel(), max(1, length))]


def _see(hessians: dict[InputQuantizer | None, Hessian], x: torch.Tensor, tokens: slice) -> None:
    """Adds a batch, a sample at a time, so that sums do not depend on the batch size."""
    for quantizer, hessian in hessians.items():
        # Rounded before samples lie one after another: a range is a sample's own.
        y = x if quantizer is None else quantizer(x)
        rows = y.reshape(-1, y.shape[-1])
        for sample in samples_of(x):
            hessian.update(rows[sample])
