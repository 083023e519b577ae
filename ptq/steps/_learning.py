"""What learned solvers share: a block whose Linears learn their weights from pairs, one block in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ptq.calibration.samples import Pair, Pairs, shuffled
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.network.network import Block, replace_module, weight_of
from ptq.ranks.gradient_sum import sum_gradients
from ptq.ranks.reduction import in_shares
from ptq.steps._solving import BlockInputs, Solved, captures_of, quantize_linear, specs_of
from ptq.steps._step import GRADIENTS, REFERENCE, SAMPLES, Context
from quantize.codecs.base import checked
from quantize.modules.learned import LearnedLinear, weights_held
from quantize.modules.online import carry_online
from quantize.solvers.rounding import LearnedWeight

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of products in which a step may learn, by the name that its options have for them."""
LEAST_PAIRS = 2
"""Batches without which nothing can be both learned and held out."""


@dataclass(frozen=True)
class Learned:
    """What learning did to a block: the held out error before it, the least met, and the step at which that was met."""

    before: float
    after: float
    step: int


def check_pairs(step: str, samples: int, batch_size: int) -> None:
    """Raises `UserError` when `samples` calibration samples make too few batches to learn from and to hold out."""
    if -(-samples // batch_size) < LEAST_PAIRS:
        raise UserError(
            f"calibration.samples: {samples} in batches of {batch_size} leave steps.{step} nothing to hold out while it "
            f"learns: use {LEAST_PAIRS * batch_size} samples or more, or calibration.batch_size=1"
        )


def captures_to_learn(scheme: SchemeConfig, target: str) -> frozenset[str]:
    """Returns what a solver needs that learns from pairs with this target: `SAMPLES`, `GRADIENTS`, and what static input ranges need."""
    return captures_of(scheme) | {SAMPLES, GRADIENTS} | ({REFERENCE} if target == "original" else set())


@torch.no_grad()
def trainable(
    context: Context,
    block: Block,
    made: Callable[[str, torch.Tensor], LearnedWeight],
    inputs: BlockInputs,
    log_scales: Mapping[str, nn.Parameter],
    precision: str = "float32",
) -> tuple[dict[str, nn.Module], dict[str, LearnedLinear]]:
    """Puts `LearnedLinear`s in the places of the block's Linears whose weights are quantized.

    Args:
        context: what the step sees.
        block: its weights are in memory.
        made: gives what is learned of a weight (out, in), by full name of its Linear.
        inputs: gives the quantizers of the inputs.
        log_scales: of what readers' inputs are divided by, by name; those not named are divided by nothing.
        precision: type of the products while they learn, of `PRECISIONS`; float32 leaves the model's own.

    Returns:
        The Linears that stood there, and those that stand there now, by name.

    Raises:
        UserError: for a weight without values (on the meta device), with NaN or inf, or of a format that has no ranges.
    """
    originals: dict[str, nn.Module] = {}
    learned: dict[str, LearnedLinear] = {}
    dtype = None if precision == "float32" else PRECISIONS[precision]
    for name in (name for stage in context.stages(block) for name in stage):
        specs = specs_of(context, name)
        if specs.weight is None:
            continue
        module: nn.Module = context.module(name)
        try:
            weight = made(name, checked(weight_of(module)))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        bias = module.bias if isinstance(module.bias, torch.Tensor) else None
        linear = LearnedLinear(weight, bias, inputs.of(name, specs), log_scales.get(name), dtype)
        carry_online(module, linear)
        replace_module(context.network.model, name, linear)
        originals[name], learned[name] = module, linear
    return originals, learned


def learn(
    pairs: Pairs,
    linears: Sequence[LearnedLinear],
    parameters: Sequence[nn.Parameter],
    steps: int,
    held_out: int,
    update: Callable[[int], None],
    seed: int,
) -> Learned:
    """Lowers the block's output error on pairs, and leaves the parameters at the least error met on held out pairs.

    Errors are plain squares, as published (AutoRound, equation 1; OmniQuant, equation 1). Relative to the size of each token's residual
    stream, by which the norms that read it divide, they would give up the token whose massive activation a block makes: later
    blocks' attentions look at that one more than at any other (docs/results.md, "Learned rounding"). Ranks share the parts of a batch, and
    the held out batches; all end with the bits that one of them alone has.

    Args:
        pairs: of the block.
        linears: the block's, whose weights are learned.
        parameters: leaves that gradients are taken of.
        steps: gradient steps, one batch each.
        held_out: one batch in so many is only looked at, never learned from; at least one is.
        update: called after the gradients of step number 0, 1, ... are there; changes the parameters and drops the gradients.
        seed: of the order of the batches.
    """
    apart, rest = held_apart(len(pairs), held_out)
    looks = {0, *(round(steps * k / LOOKS) for k in range(1, LOOKS + 1))}
    best, before, at = [p.detach().clone() for p in parameters], 0.0, 0
    least, done = float("inf"), 0
    while True:
        if done in looks:
            error = _held_out(pairs, apart)
            before = error if done == 0 else before
            if error < least:
                best, least, at = [p.detach().clone() for p in parameters], error, done
        if done == steps:
            break
        for number in shuffled(rest, seed + done):
            _gradients(pairs, number, linears, parameters)
            update(done)
            done += 1
            if done in looks:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return Learned(before, least, at)


def held_apart(batches: int, held_out: int) -> tuple[list[int], list[int]]:
    """Returns the numbers of the batches that are only looked at, one in `held_out` and at least one, and of those that are learned from."""
    every = min(held_out, batches)
    apart = [i for i in range(batches) if i % every == every - 1]
    return apart, [i for i in range(batches) if i % every != every - 1]


LOOKS = 8
"""How often the held out error is looked at."""


def restored(context: Context, originals: Mapping[str, nn.Module]) -> None:
    """Puts the Linears back that `trainable` replaced."""
    for name, module in originals.items():
        replace_module(context.network.model, name, module)


def quantize_learned(context: Context, block: Block, learned: Mapping[str, LearnedLinear], inputs: BlockInputs) -> None:
    """Quantizes the block's Linears, with the weights that were learned."""
    for name in (name for stage in context.stages(block) for name in stage):
        specs = specs_of(context, name)
        if specs.any:
            solve = None if name not in learned else _final(learned[name])
            quantize_linear(context, name, specs, inputs.of(name, specs), solve)


def _final(linear: LearnedLinear) -> Callable[[torch.Tensor], Solved]:
    return lambda weight: linear.learned.final()


def _gradients(pairs: Pairs, number: int, linears: Sequence[LearnedLinear], parameters: Sequence[nn.Parameter]) -> None:
    """Gives the parameters the gradients of the mean error of one batch."""
    values = pairs.values(number)

    def backward(part: int) -> None:
        with torch.enable_grad():
            (_error(pairs.part(part)) / values).backward()  # type: ignore[no-untyped-call]

    with weights_held(linears) as weights:
        sum_gradients(pairs.world, [*weights.leaves, *parameters], pairs.parts(number), backward)
        weights.backward()


@torch.no_grad()
def _held_out(pairs: Pairs, numbers: Sequence[int]) -> float:
    """Returns the mean error of those batches."""

    def errors(share: slice) -> tuple[torch.Tensor]:
        found = [_error(pair) / pair.target.numel() for pair in pairs.batches(only=numbers[share])]
        return (torch.stack(found).cpu(),)

    (means,) = in_shares(pairs.world, len(numbers), errors)
    return float(means.sum()) / len(numbers)


def _error(pair: Pair) -> torch.Tensor:
    """Returns the sum of (output - target)^2."""
    return (pair.output().float() - pair.target.float()).square().sum()
