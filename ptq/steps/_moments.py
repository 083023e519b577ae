"""Second moments of what the Linears of a stage read now, for solvers that weigh errors by them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

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
    """Returns `block_hessians` of one stage."""
    return block_hessians(context, block, [stage], inputs)


def block_hessians(
    context: Context, block: Block, stages: Sequence[tuple[str, ...]], inputs: BlockInputs
) -> dict[str, torch.Tensor]:
    """Returns H = 2 X^T X / n, float32 (in, in), by full name of each Linear of these stages whose weight is quantized.

    X is what the Linear reads now, on all calibration samples, rounded as its input will be. Linears with one input share
    one tensor. The samples pass once.

    Raises:
        UserError: when no samples were drawn.
    """
    samples = context.samples_of("calibration")
    flow, world = samples.flow, samples.stream.world
    readers: dict[str, dict[InputQuantizer | None, list[str]]] = {}
    for stage in stages:
        names = [name for name in stage if specs_of(context, name).weight is not None]
        for name in names:
            readers.setdefault(names[0], {}).setdefault(inputs.of(name, specs_of(context, name)), []).append(name)
    empty: dict[str, Callable[[], Hessian]] = {}
    found: dict[str, dict[InputQuantizer | None, SampleSum[Hessian]]] = {}
    for first, of in readers.items():
        weight = weight_of(context.module(first))
        empty[first] = partial(Hessian, weight.shape[1], weight.device)
        found[first] = {quantizer: SampleSum(flow.leaf, empty[first], merged, Hessian.clear) for quantizer in of}
    if found:
        watchers = {first: partial(_see, sums, flow.ids.shape[1]) for first, sums in found.items()}
        samples.feed(block, watchers, shared=True)
    matrices: dict[str, torch.Tensor] = {}
    for first, of in readers.items():
        for quantizer, names in of.items():
            total = total_of(world, found[first][quantizer], Hessian.from_state, samples.stream.device)
            matrix = (empty[first]() if total is None else total).matrix
            matrices |= dict.fromkeys(names, matrix)
    return matrices


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
