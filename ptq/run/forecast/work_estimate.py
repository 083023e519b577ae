"""What the phases of a run do, counted from shapes: products, GPTQ's columns, bytes read and written."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ptq.config.schema import Recipe
from ptq.config.scheme import linear_specs
from ptq.footprint.footprint import bytes_of, inventory
from ptq.footprint.passes import block_flops
from ptq.network.experts.routing import ALL, LEAST
from ptq.network.network import Block, Network, weight_of
from ptq.run.forecast.machine_speed import MachineSpeed
from ptq.run.one_pass.block_files import keeps_export
from ptq.run.one_pass.quantize import goes_in_one_pass
from ptq.steps._step import REFERENCE, SAMPLES, STATISTICS, Step, Tuner

WINDOWS = 256
"""Evaluation windows where a recipe takes all that the text has, which is not read here."""
ROUNDING, FACTORING = 6, 3
"""Operations of GPTQ: times out in^2 of a weight (out, in) for rounding and losses, times in^3 for factorising a Hessian."""


@dataclass(frozen=True)
class Work:
    """What a phase does.

    Attributes:
        products: floating-point operations of products.
        columns: columns that GPTQ takes one after another.
        read: bytes read.
        written: bytes written.
        shared: whether ranks share the products.
    """

    products: float = 0
    columns: float = 0
    read: float = 0
    written: float = 0
    shared: bool = True

    def seconds(self, speed: MachineSpeed, ranks: int = 1) -> float:
        """Returns how long it takes, nothing of it at the same time as anything else."""
        alone = self.read / speed.read + self.written / speed.written + self.columns / speed.columns
        return alone + self.products / speed.products / (ranks if self.shared else 1)


def work_of(
    recipe: Recipe, network: Network, steps: Mapping[str, Step], checkpoint: int, value: int
) -> dict[str, Work]:
    """Returns what each phase of a run does, in order.

    Searches of transforms and the steps of learned solvers are not counted, nor is drawing the texts.

    Args:
        recipe: of the run.
        network: on the meta device.
        steps: built from the recipe.
        checkpoint: bytes of the model's files.
        value: bytes of a number in the arithmetic's type.

    Raises:
        NotTraceable: when the model's forward pass does not run without values.
    """
    c, e = recipe.calibration, recipe.evaluation
    calibrated, evaluated = c.samples * c.length, (WINDOWS if e.windows is None else e.windows) * e.length
    passed = block_flops(network, c.length)
    a_token, head_token = sum(passed.blocks.values()) / c.length, passed.head / c.length
    wanted = frozenset[str]().union(*(step.captures(recipe.scheme) for step in steps.values()))
    offloaded, on_disk = recipe.execution.weights == "offloaded", recipe.execution.hidden_states == "disk"
    once = goes_in_one_pass(recipe, steps)
    # Links, baseline and quantization read the blocks each, or together.
    a_pass, beside = checkpoint if offloaded else 0, checkpoint if offloaded and not once else 0
    width = int(network.model.config.get_text_config().hidden_size) * value * len(network.blocks)
    spill = width if on_disk else 0
    quantized = _stored(recipe, network)
    # A file of statistics says of which weights it is: these are read for their digest.
    given = STATISTICS in wanted and recipe.calibration.statistics is not None
    work = {"load": Work(read=0 if once and not given else checkpoint)}
    if beside:
        work["links"] = Work(read=beside)
    if STATISTICS in wanted and not given:
        work["calibration"] = Work(a_token * calibrated, 0, beside + spill * calibrated, spill * calibrated)
    work["baseline"] = Work((a_token + head_token) * evaluated, 0, beside + spill * evaluated, spill * evaluated)
    carried = calibrated if wanted & {SAMPLES, REFERENCE} else 0
    passes = 2 if REFERENCE in wanted else 1
    solving = Work()
    if carried:
        # Without the fast path every stage of a block is a pass of its own, and the last carries the samples on.
        apart = [block for block in network.blocks if on_disk or (offloaded and block.mixtures)]
        passes += max((_stages(block) for block in apart), default=0)
        solving = _solving(network, recipe, passed.chosen, carried)
    moved = spill * (evaluated + carried * passes)
    saved = quantized if recipe.execution.save or (recipe.export is not None and offloaded) else 0
    work["quantize"] = Work(
        a_token * (evaluated + carried * passes) + solving.products, solving.columns, a_pass + moved, saved + moved
    )
    if (tuner := next((step for step in steps.values() if isinstance(step, Tuner)), None)) is not None:
        samples = c.most_tuning_samples or c.samples
        work["targets"] = Work(a_token * samples * c.length)
        learned, looked = tuner.passes(samples)
        # Backward is two products for each of forward's; the unquantized head gives what predictions are compared with.
        products = learned * (3 * a_token + 4 * head_token) + looked * (a_token + 2 * head_token)
        work["tune"] = Work(products * c.length + a_token * evaluated)
    work["evaluate"] = Work(2 * head_token * evaluated)
    if recipe.export is not None:
        linked = once and keeps_export(recipe, steps)
        work["export"] = Work(read=0 if linked else saved, written=0 if linked else quantized, shared=False)
    return work


def _stored(recipe: Recipe, network: Network) -> int:
    """Returns the bytes of the quantized model."""
    held = bytes_of(inventory(network, ()), lambda name: linear_specs(recipe.scheme, name).weight, torch.float16)
    return sum(part.bytes for part in held)


def _stages(block: Block) -> int:
    """Returns about how many tensors the block's Linears read one after another; the experts of a mixture count together."""
    experts = {name for names in block.experts.values() for name in names}
    plain = [weight_of(module) for name, module in block.linears.items() if name not in experts]
    return (2 if experts else 0) + (4 if len(plain) > 3 else len(plain))


def _solving(network: Network, recipe: Recipe, chosen: Mapping[str, float], tokens: int) -> Work:
    """Returns the moments' products, the factorisations and the rounding of all Linears that have a weight's format."""
    products, columns = 0.0, 0.0
    for block in network.blocks:
        experts = {name for names in block.experts.values() for name in names}
        sent = _sent(block, recipe, chosen[block.name])
        groups: dict[tuple[str, int, bool], float] = {}
        for name, module in block.linears.items():
            if linear_specs(recipe.scheme, name).weight is None:
                continue
            rows, width = weight_of(module).shape
            products += ROUNDING * rows * width**2
            # Linears beside one another with one width read one tensor; an expert's tokens are those it is sent.
            key = name.rpartition(".")[0], int(width), name in experts
            groups[key] = sent if name in experts else tokens
        for (_, width, _), seen in groups.items():
            products += seen * width**2 + FACTORING * width**3
            columns += width
    return Work(products, columns)


def _sent(block: Block, recipe: Recipe, chosen: float) -> float:
    """Returns the tokens that one expert of the block sees, on average, where the router sends a token to `chosen` of them."""
    c = recipe.calibration
    tokens = c.samples * c.length
    if c.experts == ALL:
        return float(tokens)
    least = int(c.experts.removeprefix(LEAST)) if c.experts.startswith(LEAST) else 0
    return max(float(least), tokens * chosen / max(1, len(block.experts)))
