"""What a step is: one stage of a recipe, and what it may see and ask for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ptq.config import SchemeConfig
from ptq.links import Link, Trace
from ptq.network import Block, Network
from ptq.paused import PausedPass
from ptq.statistics import Statistics
from ptq.stream import BlockStream, Flow
from quantize.linear import QuantLinear

TRANSFORM = "transform"
"""A step that rewrites a block without changing its function: smooth, cluster, ..."""
SOLVER = "solver"
"""A step that picks the quantized weights: rtn, gptq, ..."""

STATISTICS = "statistics"
"""Capture: per-channel statistics of every Linear, taken on the calibration samples before the first block."""
SAMPLES = "samples"
"""Capture: the calibration samples themselves, as they reach each block."""
REFERENCE = "reference"
"""Capture: the same samples once more, as they reach each block of the unquantized network."""


Watcher = Callable[[torch.Tensor, slice], None]
"""Called with the input of a module (..., channels), and which of all samples' tokens, one after another, these are."""


class _Seen(Exception):
    """Raised inside a block's forward when every watcher has seen its input."""


class Samples:
    """The calibration samples as they reach the present block: every earlier block is quantized already.

    `reference` carries the same samples through the unquantized blocks, where a step captures `REFERENCE`.
    """

    def __init__(self, stream: BlockStream, flow: Flow, reference: Flow | None = None):
        self.stream, self.flow, self.reference = stream, flow, reference
        self._kept: dict[int, torch.Tensor] = {}
        self._paused: PausedPass | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return self.flow.ids.numel()

    @torch.no_grad()
    def feed(self, block: Block, watchers: Mapping[str, Watcher]) -> None:
        """Lets every batch pass through the block as it is now; the samples themselves stay where they are.

        Inside `stage_by_stage` nothing passes for what reads the tensor that the batches wait with.

        Args:
            block: the present block, weights in memory.
            watchers: by full name of a module, what looks at its input; "" for the block's output. A batch stops at the
                last of them.
        """
        if self._paused is not None and watchers and set(watchers) <= set(self._paused.stage):
            for rows, x in self._paused.inputs():
                for watcher in watchers.values():
                    watcher(x, _tokens(self.flow, rows))
            return
        for i, rows in self.flow.slices():
            self._pass(self.flow, block, i, rows, watchers)

    @contextmanager
    def stage_by_stage(self, block: Block, stages: Sequence[tuple[str, ...]]) -> Iterator[Iterator[tuple[str, ...]]]:
        """Gives the stages in order, for a solver that replaces the Linears of one before it asks for the next.

        With resident weights and hidden states in memory the samples pass once for all stages, and their outputs are kept
        for the stream. Otherwise every `feed` is a pass of its own, and only the hidden states are held.

        Args:
            block: the present block, weights in memory.
            stages: full names of the Linears that read one tensor, in the order of their calls.
        """
        if not (self.stream.weights.resident and self.stream.hidden_states == "memory" and stages):
            yield iter(stages)
            return
        with PausedPass(self.stream, self.flow, block, stages) as paused:
            self._paused = paused
            try:
                yield _advanced(paused, stages)
                paused.finish()
            finally:
                self._paused = None

    @torch.no_grad()
    def advance_reference(self, block: Block, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Carries the reference samples through the block, which is not quantized yet.

        Returns:
            The inputs (tokens of all samples, channels) of the modules `names`, and the block's output for the name "", in
            memory or memory-mapped as the execution asks for hidden states; they are overwritten by the next call.

        Raises:
            ValueError: when no step captures `REFERENCE`.
        """
        reference = self.reference
        if reference is None:
            raise ValueError("no step captures the reference samples")
        kept: dict[str, torch.Tensor] = {}

        def keep(place: int, name: str, x: torch.Tensor, tokens: slice) -> None:
            shape = (reference.ids.numel(), x.shape[-1])
            if self._kept.get(place) is None or self._kept[place].shape != shape:
                self._kept[place] = self.stream.allocate(shape, x)
            kept[name] = self._kept[place]
            kept[name][tokens].copy_(x.reshape(-1, x.shape[-1]))

        watchers = {name: partial(keep, place, name) for place, name in enumerate(names) if name}
        for i, rows in reference.slices():
            reference.hidden[rows].copy_(self._pass(reference, block, i, rows, watchers, whole=True))
        if "" in names:
            kept[""] = reference.hidden.flatten(0, 1)
        return kept

    def _pass(
        self, flow: Flow, block: Block, batch: int, rows: slice, watchers: Mapping[str, Watcher], whole: bool = False
    ) -> torch.Tensor:
        """Calls the block for one batch; stops at the last watcher unless the `whole` block is wanted."""
        left, tokens = set(watchers), _tokens(flow, rows)

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(module: nn.Module, args: tuple[Any, ...]) -> None:
                watchers[name](args[0], tokens)
                left.discard(name)
                if not left and not whole:
                    raise _Seen

            return look

        model = self.stream.network.model
        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watchers if name]
        hidden = flow.hidden[rows].to(self.stream.device)
        try:
            with suppress(_Seen):
                output = self.stream.call(flow, block, batch, hidden)
                if "" in watchers:
                    watchers[""](output, tokens)
                return output
        finally:
            for handle in handles:
                handle.remove()
        return hidden


def _advanced(paused: PausedPass, stages: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    for stage in stages:
        paused.advance()
        yield stage


def _tokens(flow: Flow, rows: slice) -> slice:
    """Returns which of all samples' tokens, one after another, those of a batch are."""
    length = flow.ids.shape[1]
    return slice(rows.start * length, min(rows.stop, len(flow.ids)) * length)


@dataclass
class Plan:
    """What a step sees of the whole network, before the first block, and what steps tell one another.

    Attributes:
        network: the model as blocks.
        stream: brings a block's weights into memory (``stream.weights.hold``) and calls blocks.
        scheme: which tensor gets which `QuantSpec`.
        traces: links, roles and stages by block.
        statistics: of every Linear, kept true by the transforms; None when no step of the recipe captures them.
        samples: the calibration samples; None when no step captures them.
        labels: by full name of a Linear, which cluster each of its input channels is in, int64 (in,); written by cluster.
        attentions: full names of the modules that call transformers' attention interface, by block.
        head_clusters: clusters of each head's query, key and value; written by cluster.
        note: writes a line into the run's log.
        quantized: called with (full name, the Linear, the `QuantLinear` in its place), right after the replacement; a step
            that still needs the original's weight takes what it needs before.
    """

    network: Network
    stream: BlockStream
    scheme: SchemeConfig
    traces: dict[int, Trace] = field(default_factory=dict)
    statistics: Statistics | None = None
    samples: Samples | None = None
    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    attentions: dict[int, list[str]] = field(default_factory=dict)
    head_clusters: int = 0
    note: Callable[[str], None] = lambda line: None
    quantized: Callable[[str, nn.Module, QuantLinear], None] = lambda name, original, module: None

    @property
    def roles(self) -> dict[str, str]:
        """Query, key or value by full name of the Linear that computes it."""
        return {name: role for trace in self.traces.values() for name, role in trace.roles.items()}

    def links(self, block: Block) -> list[Link]:
        """Returns the proved links of a block."""
        return self.traces[block.index].links if block.index in self.traces else []

    def sums(self, block: Block) -> dict[str, str]:
        """Returns `ptq.sums.find_sums` of a block: where the outputs of its Linears are added to the residual stream."""
        return self.traces[block.index].sums if block.index in self.traces else {}

    def stages(self, block: Block) -> list[tuple[str, ...]]:
        """Returns the block's Linears in the order of their calls, those that read one tensor together."""
        known = self.traces[block.index].stages if block.index in self.traces else []
        seen = {name for stage in known for name in stage}
        return known + [(name,) for name in block.linears if name not in seen]


class Step(Protocol):
    """One stage of a recipe, in order: a function-preserving transform or a solver that picks the quantized weights.

    A step's module holds a dataclass `Options` beside it. `kind` is `TRANSFORM` or `SOLVER`.
    """

    kind: ClassVar[str]

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Returns what this step needs from the calibration samples under `scheme`: `STATISTICS`, `SAMPLES`, or nothing."""

    def plan(self, plan: Plan) -> None:
        """Sees everything once, before the first block. A transform rewrites ``plan.statistics`` here, for those after it."""

    def apply(self, block: Block) -> None:
        """Changes one block whose weights are in memory; called once a block, in stream order."""
