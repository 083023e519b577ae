"""The visitor that does with a block all that a run has to do with it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ptq.calibration.rotary import RotaryFinder
from ptq.files.safetensors_file import TensorDigests
from ptq.network.block_stream import BlockStream, Flow
from ptq.network.links import Trace, Tracer, trace_of
from ptq.network.network import Block
from ptq.run.baseline import check_unquantized
from ptq.run.one_pass.block_plans import BlockPlans
from ptq.run.quantize_visitor import QuantizeVisitor


class BlockFiles(Protocol):
    """How a finished block lies in a file, with the figures of its results."""

    def write(self, block: Block, path: pathlib.Path, figures: Mapping[str, Any]) -> None:
        """Writes the block, which is in memory."""

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures."""

    def sum_of(self, path: pathlib.Path) -> int:
        """Returns a sum over all bytes that were written of the block."""


class OnePass:
    """Traces a block, lets the baseline's samples pass it, plans it, then quantizes it, while its weights are held once.

    Args:
        stream: carries the samples.
        traces: of the blocks so far; those that `tracer` finds are added.
        tracer: finds the links; None where they are known.
        baseline: the evaluation samples in the unquantized network; None where their results are known.
        plans: makes the plans of the steps for a block.
        quantizer: does the rest.
        digests: of the weights that have been read; those of each block are kept with it.
        files: how finished blocks are kept.
        check: raises `UserError` where a block, which has been planned, could not be exported.
        plain: a context in which the model calls its own attention, where it calls simulated ones otherwise.
        rotary: finds layouts of rotary embeddings; None where nobody asks for them.
    """

    def __init__(
        self,
        stream: BlockStream,
        traces: dict[int, Trace],
        tracer: Tracer | None,
        baseline: Flow | None,
        plans: BlockPlans,
        quantizer: QuantizeVisitor,
        digests: TensorDigests,
        files: BlockFiles,
        check: Callable[[], None],
        plain: Callable[[], AbstractContextManager[None]] = nullcontext,
        rotary: RotaryFinder | None = None,
    ):
        self.stream, self.traces, self.tracer, self.baseline = stream, traces, tracer, baseline
        self.plans, self.quantizer, self.digests, self.files, self.check = plans, quantizer, digests, files, check
        self.plain, self.rotary = plain, rotary
        self._noted = 0

    def enter(self, block: Block) -> None:
        """Lets pass what has to see the block as it was, then quantizes it.

        Raises:
            UserError: where the unquantized block gives NaN or inf, or what is planned for it could not be exported.
        """
        with self.plain():
            if self.tracer is not None:
                self.tracer.enter(block)
                self.traces[block.index] = self.tracer.traces[block.index]
                self.stream.step(self.tracer.flow, block)
            if self.baseline is not None:
                self.stream.step(self.baseline, block)
                check_unquantized(self.baseline)
            self.plans.measure(block)
        if self.rotary is not None:
            self.rotary.enter(block)
            self.stream.step(self.rotary.flow, block)
        self.plans.plan(block)
        self.check()
        self.quantizer.enter(block)

    def leave(self, block: Block) -> None:
        """Gives the originals back."""
        self.quantizer.leave(block)

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the finished block with its results, its links, and the digests of what has been read since the last one."""
        noted = list(self.digests.found.copy().items())
        fresh, self._noted = noted[self._noted :], len(noted)
        figures = self.quantizer.figures(block)
        figures["digests"] = [[*place, digest] for place, digest in fresh]
        figures["statistics"] = self.plans.write(block, path)
        found = {} if self.rotary is None else self.rotary.found
        figures["rotary"] = {name: layout for name, layout in found.items() if name.startswith(f"{block.name}.")}
        figures["trace"] = None if self.tracer is None else dataclasses.asdict(self.traces[block.index])
        self.files.write(block, path, figures)

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up a finished block."""
        figures = self.files.read(path)
        self.quantizer.take_up(figures)
        self.plans.read(block, path, figures["statistics"])
        self.digests.found.update(digests_of(figures))
        self._noted = len(self.digests.found)
        if self.rotary is not None:
            self.rotary.found.update(figures["rotary"])
        if self.tracer is not None:
            self.tracer.traces[block.index] = self.traces[block.index] = trace_of(figures["trace"])


def digests_of(figures: Mapping[str, Any]) -> dict[tuple[str, int, int], str]:
    """Returns the digests of tensors, by their places, that were kept with a finished block."""
    return {(str(name), int(start), int(end)): str(digest) for name, start, end, digest in figures["digests"]}
