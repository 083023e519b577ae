"""What a step is: one stage of a recipe, and what it may see and ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import nn

from ptq.calibration.samples import Samples
from ptq.calibration.statistics import Statistics
from ptq.config.schema import SchemeConfig
from ptq.network.block_stream import BlockStream
from ptq.network.links import Link, Trace
from ptq.network.network import Block, Network
from quantize.modules.simulated import QuantLinear

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
        """Returns `ptq.network.residual.find_sums` of a block: where the outputs of its Linears are added to the residual stream."""
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
