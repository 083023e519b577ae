"""Statistics of a block and the plans of steps for it, made while it is in memory."""

import dataclasses
import pathlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ptq.calibration.statistics import UNDER_WAY, Provenance, Statistics
from ptq.calibration.statistics_visitor import StatisticsVisitor
from ptq.files.atomic import write_atomic
from ptq.network.block_stream import Flow
from ptq.network.network import Block
from ptq.run.kept.kept_pass import sum_of_file
from ptq.run.planning import add_plan, statistics_again, taken_again
from ptq.steps._step import TRANSFORM, Context, Step, StepPlan


class BlockPlans:
    """Takes the statistics of each block, where it is asked to, and lets the steps that plan block by block plan it, in order.

    What they do outside the blocks is planned at once: samples that are opened from here on enter the first block as all of them
    leave it. Where a step needs statistics behind one that outdates them, they are taken of the block again as the steps between leave it.

    Args:
        context: what the steps see; its statistics are the block's from here on.
        steps: those of the run, by name, of which some plan block by block.
        known: statistics of the whole network, where it is known; else None.
        measured: what takes them, and the calibration samples in the unquantized network (`shared_statistics`); None where they are known
            or not wanted.
    """

    def __init__(
        self,
        context: Context,
        steps: Mapping[str, Step],
        known: Statistics | None = None,
        measured: tuple[StatisticsVisitor, Flow] | None = None,
    ):
        self._context, self._steps, self._known = context, dict(steps), known
        self._visitor = StatisticsVisitor(context.stream.device) if measured is None else measured[0]
        self._measured = None if measured is None else measured[1]
        self._searched: dict[str, Flow | None] = {}
        self._outside: dict[str, StepPlan] = {}
        self._again: dict[str, tuple[StatisticsVisitor, Flow]] = {}
        again = taken_again(context.scheme, self._steps)
        for name, step in self._steps.items():
            # What one searches on, or is measured for it, enters the first block as those before it leave it.
            if name in again:
                self._again[name] = statistics_again(context)
            if not step.by_block:
                continue
            self._searched[name] = step.looks_at(context)
            self._outside[name] = step.plan_outside(context)
            add_plan(context, name, step, self._outside[name])
        self._after: dict[str, Statistics] = {}
        self._lost = False

    @property
    def flows(self) -> list[Flow]:
        """The samples that pass the blocks for this."""
        again = [flow for _, flow in self._again.values()]
        return [flow for flow in (self._measured, *self._searched.values()) if flow is not None] + again

    def measure(self, block: Block) -> None:
        """Takes the statistics of a block that is in memory as it was."""
        if self._measured is not None:
            self._visitor.enter(block)
            self._context.stream.step(self._measured, block)
            self._visitor.leave(block)

    def plan(self, block: Block) -> None:
        """Makes the plans for a block that is in memory as it was, and has been measured."""
        context, stream = self._context, self._context.stream
        context.statistics = after = self._of(block)
        context.steps = {}
        for name, step in self._steps.items():
            if name in self._again:
                context.statistics = after = self._measured_again(name, block)
            if not step.by_block:
                continue
            flow, context.outside = self._searched[name], self._outside[name]
            with context.transformed(block):
                plan = step.plan_block(block, context, flow)
                if flow is not None:
                    stream.step(flow, block)
            context.plans[name] = dataclasses.replace(plan, basis=self._outside[name].basis)
            if step.kind == TRANSFORM:
                context.steps[name] = step
            after = plan.statistics or after
            # As in `add_plan`: what does not hold any more is nobody's.
            context.statistics = None if plan.stale else plan.statistics or context.statistics
        if after is not None:
            self._after[block.name] = after

    def _measured_again(self, name: str, block: Block) -> Statistics:
        visitor, flow = self._again[name]
        with self._context.transformed(block):
            visitor.enter(block)
            self._context.stream.step(flow, block)
            visitor.leave(block)
        return visitor.of_block(block)

    def result(self, provenance: Provenance) -> tuple[Statistics, Statistics] | None:
        """Returns the statistics of the network, and what the plans make of them; None where some are not there."""
        if self._lost or (self._known is None and self._measured is None):
            return None
        taken = self._known or self._visitor.result(provenance)
        after = taken.copy()
        for own in self._after.values():
            after.inputs.update(own.inputs)
            after.weights.update(own.weights)
        return taken, after

    def write(self, block: Block, path: pathlib.Path) -> int | None:
        """Writes what `result` has to know of a block; returns a sum of the file's bytes, None where nothing was taken."""
        before, after = self._of(block), self._after.get(block.name)
        if before is None or after is None:
            return None
        # What the plans leave alone is the same object: `read` makes it so again.
        changed = {name: s for name, s in after.inputs.items() if s is not before.inputs[name]}
        parts = {"before": before, "after": Statistics(changed, after.weights, UNDER_WAY)}
        tensors = {
            f"{part}|{key}": tensor.detach().cpu().clone().contiguous()
            for part, statistics in parts.items()
            for key, tensor in statistics.to_tensors().items()
        }
        write_atomic(_beside(path), lambda temporary: save_file(tensors, temporary))
        return sum_of_file(_beside(path))

    def read(self, block: Block, path: pathlib.Path, kept: int | None) -> None:
        """Takes up what `write` has written; where the file is not whole the run goes on, and `result` has nothing."""
        if kept is None:
            return
        try:
            if sum_of_file(_beside(path)) != kept:
                raise ValueError("not what was written")
            found = load_file(_beside(path), device=str(self._context.stream.device))
        except (OSError, ValueError, SafetensorError):
            self._lost = True
            return
        before, after = (_part(found, part) for part in ("before", "after"))
        self._visitor.inputs |= before.inputs
        self._visitor.weights |= before.weights
        self._after[block.name] = after

    def _of(self, block: Block) -> Statistics | None:
        """Returns the block's own statistics, as they were taken."""
        if self._known is not None:
            return self._known.of_linears(block.readers)
        return None if self._measured is None else self._visitor.of_block(block)


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".statistics")


def _part(tensors: Mapping[str, torch.Tensor], part: str) -> Statistics:
    own = {key.removeprefix(f"{part}|"): tensor for key, tensor in tensors.items() if key.startswith(f"{part}|")}
    return Statistics.from_tensors(own, UNDER_WAY)
