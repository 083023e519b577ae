"""What a step is: one stage of a recipe, and what it may see and ask for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ptq.attention import AttentionQuantizers
from ptq.config import SchemeConfig
from ptq.links import Link, Trace
from ptq.network import Block, Network, replace_module
from ptq.statistics import Statistics
from ptq.stream import BlockStream, Flow

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


class _Seen(Exception):
    """Raised inside a block's forward when every watcher has seen its input."""


class Samples:
    """The calibration samples as they reach the present block: every earlier block is quantized already.

    `reference` carries the same samples through the unquantized blocks, where a step captures `REFERENCE`.
    """

    def __init__(self, stream: BlockStream, flow: Flow, reference: Flow | None = None):
        self.stream, self.flow, self.reference = stream, flow, reference

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return self.flow.ids.numel()

    @torch.no_grad()
    def feed(self, block: Block, watchers: Mapping[str, Callable[[torch.Tensor], None]]) -> None:
        """Lets every batch pass through the block as it is now; the samples themselves stay where they are.

        Args:
            block: the present block, weights in memory.
            watchers: by full name of a module, what looks at its input (batch, tokens, channels). A batch stops at
                the last of them.
        """
        for i, _ in self.flow.slices():
            self._pass(self.flow, block, i, watchers)

    @torch.no_grad()
    def feed_pairs(
        self,
        block: Block,
        watchers: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]],
        originals: Mapping[str, nn.Module],
    ) -> None:
        """As `feed`, but a watcher sees (original input, present input) of the same tokens.

        Args:
            block: the present block, weights in memory, some of its Linears quantized.
            watchers: by full name of a module.
            originals: the unquantized Linears of the block by full name; they take their places for the reference.
        """
        if self.reference is None:
            raise ValueError("no step captures the reference samples")
        for i, _ in self.flow.slices():
            seen: dict[str, torch.Tensor] = {}
            with originals_in_place(self.stream.network.model, originals):
                self._pass(self.reference, block, i, {name: partial(seen.__setitem__, name) for name in watchers})
            self._pass(self.flow, block, i, {name: partial(look, seen[name]) for name, look in watchers.items()})

    @torch.no_grad()
    def advance_reference(self, block: Block, originals: Mapping[str, nn.Module]) -> None:
        """Carries the reference samples through the unquantized block."""
        if self.reference is not None:
            with originals_in_place(self.stream.network.model, originals):
                self.stream.step(self.reference, block)

    def _pass(
        self, flow: Flow, block: Block, batch: int, watchers: Mapping[str, Callable[[torch.Tensor], None]]
    ) -> None:
        left = set(watchers)

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(module: nn.Module, args: tuple[Any, ...]) -> None:
                watchers[name](args[0])
                left.discard(name)
                if not left:
                    raise _Seen

            return look

        model = self.stream.network.model
        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watchers]
        rows = slice(batch * flow.batch_size, (batch + 1) * flow.batch_size)
        try:
            with suppress(_Seen):
                self.stream.call(flow, block, batch, flow.hidden[rows].to(self.stream.device))
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def originals_in_place(model: nn.Module, originals: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the context the Linears `originals` (by full name) are in the model, and its attentions quantize nothing."""
    present = {name: model.get_submodule(name) for name in originals}
    attentions = [m for m in model.modules() if isinstance(m, AttentionQuantizers) and m.enabled]
    try:
        for name, module in originals.items():
            replace_module(model, name, module)
        for attention in attentions:
            attention.enabled = False
        yield
    finally:
        for name, module in present.items():
            replace_module(model, name, module)
        for attention in attentions:
            attention.enabled = True


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

    @property
    def roles(self) -> dict[str, str]:
        """Query, key or value by full name of the Linear that computes it."""
        return {name: role for trace in self.traces.values() for name, role in trace.roles.items()}

    def links(self, block: Block) -> list[Link]:
        """Returns the proved links of a block."""
        return self.traces[block.index].links if block.index in self.traces else []

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
