"""How much memory a run takes at its peak, estimated from shapes before the work, beside what the machine has."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ptq.config.schema import Recipe, SchemeConfig
from ptq.config.scheme import linear_specs
from ptq.errors import UserError
from ptq.models.memory.memory_limits import memory_limit
from ptq.network.experts.abreast import most_bytes
from ptq.network.network import Network, weight_of
from ptq.ranks.gradient_sum import part_of
from ptq.ranks.sample_sum import sums_held
from ptq.run.one_pass.quantize import goes_in_one_pass
from ptq.run.planning import taken_again
from ptq.steps._step import GRADIENTS, REFERENCE, SAMPLES, STATISTICS, TRANSFORM, Step, Tuner

PROCESS = 700 << 20
"""What Python, torch and transformers hold before any model."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of each phase, by its name, those of the process itself not counted."""

    phases: Mapping[str, int]

    @property
    def worst(self) -> tuple[str, int]:
        """The phase with the greatest peak, and its bytes."""
        return max(self.phases.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class _BlockSizes:
    """Of one block: its parameters, the input channels of Linears whose weights are quantized, the most parameters of a Linear,
    the squares of the channels that its experts' first Linears read, summed, and the channels that all Linears read and give.
    """

    parameters: int
    widths: tuple[int, ...]
    greatest: int
    experts: int
    channels: int


@dataclass(frozen=True)
class Sizes:
    """What an estimate takes from a network and a scheme: found once for all settings that are tried."""

    parameters: int
    widest: int
    blocks: tuple[_BlockSizes, ...]

    @classmethod
    def of(cls, network: Network, scheme: SchemeConfig) -> "Sizes":
        """Looks at every Linear of the network, which may be on the meta device."""
        blocks, widest = [], 0
        for block in network.blocks:
            shapes = {name: tuple(weight_of(module).shape) for name, module in block.linears.items()}
            widths = {shape[1] for name, shape in shapes.items() if linear_specs(scheme, name).weight is not None}
            experts = sum(shapes[names[0]][1] ** 2 for names in block.experts.values())
            greatest = max((math.prod(shape) for shape in shapes.values()), default=0)
            parameters = sum(p.numel() for p in block.module.parameters())
            channels = sum(sum(shape) for shape in shapes.values())
            blocks.append(_BlockSizes(parameters, tuple(sorted(widths, reverse=True)), greatest, experts, channels))
            widest = max([widest, *(max(shape) for shape in shapes.values())])
        return cls(network.parameters, widest, tuple(blocks))


def estimate(recipe: Recipe, network: Network, steps: Mapping[str, Step], sizes: Sizes | None = None) -> MemoryEstimate:
    """Returns what the phases of a run hold at once: weights, hidden states, moments, logits.

    Args:
        recipe: for the samples, the windows, and how weights and hidden states are held.
        network: the model, which may be on the meta device.
        steps: built from the recipe.
        sizes: of the network under the recipe's scheme; None to look at it.
    """
    sizes = sizes or Sizes.of(network, recipe.scheme)
    value = arithmetic_bytes(recipe)
    config = network.model.config.get_text_config()
    width, vocabulary = int(config.hidden_size), int(config.vocab_size)
    blocks = [value * block.parameters for block in sizes.blocks]
    whole, weights = sizes.parameters * value, _weights(sizes, recipe, value)
    in_memory = recipe.execution.hidden_states == "memory"
    c, e = recipe.calibration, recipe.evaluation
    windows = e.windows if e.windows is not None else 256
    calibration, evaluation = c.samples * c.length, windows * e.length
    hidden = value * width if in_memory else 0
    wanted = frozenset[str]().union(*(step.captures(recipe.scheme) for step in steps.values()))
    transforms = any(step.kind == TRANSFORM for step in steps.values())
    carried = calibration if wanted & {SAMPLES, REFERENCE} else c.batch_size * c.length if transforms else 0
    flows = hidden * (evaluation + carried * (2 if REFERENCE in wanted else 1))
    if goes_in_one_pass(recipe, steps) and STATISTICS in wanted:
        flows += hidden * calibration * (1 + len(taken_again(recipe.scheme, steps)))  # statistics are taken on the way
    logits = 4 * 3 * e.chunk * vocabulary
    baseline = 4 * width * evaluation
    quantize = weights + flows + baseline + max(blocks, default=0)
    if SAMPLES in wanted or REFERENCE in wanted:
        quantize += max(
            (_solving(b, recipe, carried, value, REFERENCE in wanted, in_memory) for b in sizes.blocks), default=0
        )
    if GRADIENTS in wanted:
        quantize += _learning(recipe) * max((block.parameters for block in sizes.blocks), default=0)
    tuner = next((step for step in steps.values() if isinstance(step, Tuner)), None)
    tuned = {}
    if tuner is not None:
        tuned["tune"] = weights + flows + baseline + _tuning(sizes, recipe, width, value)
    return MemoryEstimate(
        {
            "load": int(1.25 * whole) if recipe.execution.weights == "resident" else weights,
            "calibration": weights + hidden * calibration + _pass(sizes, c.batch_size * c.length, value),
            "baseline": weights + hidden * evaluation + max(logits, _pass(sizes, e.batch_size * e.length, value)),
            "quantize": quantize,
            **tuned,
            "evaluate": weights + flows + baseline + logits,
        }
    )


def estimate_sensitivity(recipe: Recipe, network: Network, formats: int, sizes: Sizes | None = None) -> MemoryEstimate:
    """Returns what measuring the sensitivity to so many `formats` holds at once: weights, what reaches each block, one block's errors
    and gradients. What is kept beside that takes what is free.

    Args:
        recipe: its calibration samples are those that are used.
        network: the model, which may be on the meta device.
        formats: how many.
        sizes: of the network under the recipe's scheme; None to look at it.
    """
    sizes = sizes or Sizes.of(network, recipe.scheme)
    value, c = arithmetic_bytes(recipe), recipe.calibration
    config = network.model.config.get_text_config()
    width, batch = int(config.hidden_size), c.batch_size * c.length
    # What reaches each block, what left the last one, and its gradients.
    states = len(sizes.blocks) + 2 if recipe.execution.hidden_states == "memory" else 0
    held = _weights(sizes, recipe, value) + states * value * width * c.samples * c.length
    largest = max(sizes.blocks, key=lambda block: block.parameters)
    # What lies between the Linears too, and derivatives beside it: found on SmolLM2, 2.40 GiB where this says 2.45.
    graph = 8 * value * batch * largest.channels
    return MemoryEstimate(
        {
            "forward": held + _pass(sizes, batch, value),
            "head": held + 4 * 3 * recipe.evaluation.chunk * int(config.vocab_size),
            "backward": held + 4 * (formats + 1) * largest.parameters + graph,
        }
    )


def check_sensitivity_memory(recipe: Recipe, network: Network, formats: int, total: int | None = None) -> str:
    """As `check_memory`, for `estimate_sensitivity`."""
    sizes = Sizes.of(network, recipe.scheme)
    return _checked(recipe, lambda r: estimate_sensitivity(r, network, formats, sizes), False, total)


def check_memory(recipe: Recipe, network: Network, steps: Mapping[str, Step], total: int | None = None) -> str:
    """Returns the estimate beside what there is, in one line.

    Args:
        recipe: the run's.
        network: the model, which may be on the meta device.
        steps: built from the recipe.
        total: bytes of memory; None asks the machine.

    Raises:
        UserError: when the run cannot fit, with the setting that would make it fit.
    """
    sizes = Sizes.of(network, recipe.scheme)
    tuned = any(isinstance(step, Tuner) for step in steps.values())
    return _checked(recipe, lambda r: estimate(r, network, steps, sizes), tuned, total)


def _checked(recipe: Recipe, estimated: Callable[[Recipe], MemoryEstimate], tuned: bool, total: int | None) -> str:
    """Returns what is `estimated` of the recipe beside what there is. Raises `UserError` as `check_memory` does."""
    there = memory_of(recipe) if total is None else total
    phase, need = estimated(recipe).worst
    need += PROCESS
    line = f"memory: some {_gib(need)} at its peak ({phase}), {_gib(there)} there"
    if need <= there:
        return line
    savings = _savings(recipe, tuned)
    changed = next((words for words, other in savings if estimated(other).worst[1] + PROCESS <= there), None)
    advice = (
        f"use {changed}" if changed else "no setting makes it fit: take a machine with more memory, or a smaller model"
    )
    raise UserError(f"execution.weights: {recipe.execution.weights!r}: {line.removeprefix('memory: ')}: {advice}")


def memory_of(recipe: Recipe) -> int:
    """Returns the bytes of memory that the run may use: of its CUDA device, else `memory_limit`."""
    name = recipe.execution.device
    cuda = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
    if cuda and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.device("cuda" if name == "auto" else name)).total_memory)
    return memory_limit()


def _weights(sizes: Sizes, recipe: Recipe, value: int) -> int:
    """Returns what is held of the weights at once: all, or a block and the one that is read ahead."""
    blocks = [value * block.parameters for block in sizes.blocks]
    if recipe.execution.weights == "resident":
        return sizes.parameters * value
    ahead = 2 if recipe.execution.prefetch else 1
    return max([sizes.parameters * value - sum(blocks), *(ahead * b for b in blocks)])


def _savings(recipe: Recipe, resident: bool) -> list[tuple[str, Recipe]]:
    """Returns settings that take less memory, those that cost least first, and all together last; weights are to be `resident`
    where something works on the whole network.
    """
    x, c = recipe.execution, recipe.calibration
    changes: dict[str, Callable[[Recipe], Recipe]] = {
        "calibration.batch_size=1": lambda r: replace(r, calibration=replace(r.calibration, batch_size=1)),
        "execution.hidden_states=disk": lambda r: replace(r, execution=replace(r.execution, hidden_states="disk")),
        "execution.weights=offloaded": lambda r: replace(r, execution=replace(r.execution, weights="offloaded")),
        "execution.prefetch=false": lambda r: replace(r, execution=replace(r.execution, prefetch=False)),
    }
    if not (x.prefetch and x.weights == "offloaded"):
        del changes["execution.prefetch=false"]
    if c.batch_size == 1:
        del changes["calibration.batch_size=1"]
    if x.hidden_states == "disk":
        del changes["execution.hidden_states=disk"]
    if x.weights == "offloaded" or resident:
        del changes["execution.weights=offloaded"]
    found = [(words, change(recipe)) for words, change in changes.items()]
    everything = recipe
    for change in changes.values():
        everything = change(everything)
    fewer = replace(everything, calibration=replace(everything.calibration, samples=max(1, c.samples // 4)))
    together = " ".join(changes)
    return [*found, (together, everything), (f"{together} calibration.samples={fewer.calibration.samples}", fewer)]


def arithmetic_bytes(recipe: Recipe) -> int:
    """Returns the bytes of a number in the arithmetic's type."""
    if recipe.model.dtype != "auto":
        return int(getattr(torch, recipe.model.dtype).itemsize)
    return 4 if recipe.execution.device == "cpu" or not torch.cuda.is_available() else 2


def _pass(sizes: Sizes, tokens: int, value: int) -> int:
    """Returns what one batch holds inside a block: some tensors of the widest Linears' inputs and outputs."""
    return 4 * value * tokens * sizes.widest


def _tuning(sizes: Sizes, recipe: Recipe, width: int, value: int) -> int:
    """Returns what tuning holds beside weights and samples: codes and the weights that they stand for, a sample's graph, and all samples'
    states twice.
    """
    c = recipe.calibration
    codes = (1 + 2 + value) * sum(block.parameters for block in sizes.blocks)
    graph = 2 * value * c.length * sum(block.channels for block in sizes.blocks)
    return codes + graph + 2 * value * width * (c.most_tuning_samples or c.samples) * c.length


def _learning(recipe: Recipe) -> int:
    """Returns what a solver that learns holds for each of a block's weights, in float32: itself, what is learned of it and the best of
    that so far, the weight that it stands for, and the sums of gradients of a batch's parts.
    """
    batch = recipe.calibration.batch_size
    return 4 * (4 + sums_held(max(2, batch // part_of(batch))))


def _solving(block: _BlockSizes, recipe: Recipe, tokens: int, value: int, reference: bool, in_memory: bool) -> int:
    """Returns what a solver holds beside weights and samples: what batches wait with, references, moments, their factors."""
    widest = max(block.widths, default=0)
    waiting = 3 * value * tokens * widest if in_memory else 0
    held = value * tokens * sum(block.widths[:2]) if reference and in_memory else 0
    # The Hessian, its inverse and its factor, and the cross moment of a target; in float64 while they are factorised. Before that
    # the sums of the samples' tree.
    sums = sums_held(recipe.calibration.samples)
    moments = widest * widest * max(4 * 3 + 8, 4 * sums * (2 if reference else 1))
    if not in_memory or recipe.execution.weights == "offloaded":  # the experts' moments of one pass
        moments += min(4 * sums * block.experts, most_bytes(block.parameters))
    return waiting + held + moments + 2 * value * block.greatest


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
