"""The contract that methods live by: what a step sees, what it decides once, and what it may change in a block."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ptq.calibration.samples import Samples
from ptq.calibration.statistics import Provenance, Statistics
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.files.bounded import parse_json
from ptq.network.basis import Basis
from ptq.network.block_stream import BlockStream, Flow, Kept, Visitor
from ptq.network.links import Link, Trace
from ptq.network.network import Block, Network
from ptq.network.replaced import put_back
from ptq.ranks.sample_sum import shares
from quantize.modules.simulated import QuantLinear
from quantize.spec.quant_spec import QuantSpec

TRANSFORM = "transform"
"""A step that rewrites a block without changing its function: smooth, cluster, ..."""
SOLVER = "solver"
"""A step that picks the quantized weights: rtn, gptq, ..."""
TUNER = "tuner"
"""A step that learns, on the finished network as a whole, what codes that a solver has picked are multiplied by: tune."""

STATISTICS = "statistics"
"""Capture: per-channel statistics of every Linear, taken on the calibration samples before the first block."""
SAMPLES = "samples"
"""Capture: the calibration samples themselves, as they reach each block."""
REFERENCE = "reference"
"""Capture: the same samples once more, as they reach each block of the unquantized network."""
GRADIENTS = "gradients"
"""Capture: the samples in parts of batches too, whose gradients ranks share."""

INPUT, OUTPUT, WEIGHT_INPUT, WEIGHT_OUTPUT, QUERY, KEY, RESIDUAL, CORRECTION = PLACES = (
    "input", "output", "weight_input", "weight_output", "query", "key", "residual", "correction",
)  # fmt: skip
"""Where a step acts: on what a Linear reads or gives (online), on its columns or rows, on query and key after rotary embeddings
(online), on the residual stream as a whole, or by a product of low rank that it adds to a weight (`QuantLinear.correct`)."""


@dataclass(frozen=True)
class StepPlan:
    """What a step decided when it saw everything. It can be stored, and is all that `Step.apply` knows of the planning.

    Attributes:
        tensors: by a name of the step's own.
        figures: plain figures and lists, as JSON holds them.
        labels: by full name of a Linear, which cluster each of its input channels is in, int64 (in,).
        head_clusters: clusters of each head's query, key and value, or 0.
        clips: by full name of a Linear, the share of its input's range that is kept (`QuantSpec.clip`).
        basis: the residual stream's new basis, or None where it stays as it is.
        statistics: of every Linear once the step has been applied, or None where it leaves them as they are.
        stale: the statistics do not hold any more and cannot be rewritten: they are taken again for who needs them.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, torch.Tensor] = field(default_factory=dict)
    head_clusters: int = 0
    clips: Mapping[str, float] = field(default_factory=dict)
    basis: Basis | None = None
    statistics: Statistics | None = None
    stale: bool = False

    def save(self, path: pathlib.Path) -> None:
        """Writes the plan as one safetensors file."""
        tensors = {f"tensors|{name}": tensor for name, tensor in self.tensors.items()}
        tensors |= {f"labels|{name}": tensor for name, tensor in self.labels.items()}
        names = ("figures", "head_clusters", "clips", "stale")
        facts: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.basis is not None:
            tensors |= {"basis|matrix": self.basis.matrix, "basis|inverse": self.basis.inverse}
            facts |= {"centred": self.basis.centred, "first": self.basis.first}
        if self.statistics is not None:
            tensors |= {f"statistics|{name}": tensor for name, tensor in self.statistics.to_tensors().items()}
            facts["provenance"] = dataclasses.asdict(self.statistics.provenance)
        # Tensors that share memory are refused by safetensors: each gets its own.
        own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(own, path, metadata={"kind": "step plan", "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: pathlib.Path, device: torch.device) -> Self:
        """Reads what `save` wrote, its tensors on `device`."""
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = parse_json(file.metadata()["facts"])
            found = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, torch.Tensor]] = {"tensors": {}, "labels": {}, "basis": {}, "statistics": {}}
        for key, tensor in found.items():
            part, _, name = key.partition("|")
            parts[part][name] = tensor
        basis = statistics = None
        if parts["basis"]:
            held = parts["basis"]
            basis = Basis(held["matrix"], held["inverse"], facts["centred"], tuple(facts["first"]))
        if "provenance" in facts:
            statistics = Statistics.from_tensors(parts["statistics"], Provenance(**facts["provenance"]))
        return cls(
            parts["tensors"],
            facts["figures"],
            parts["labels"],
            facts["head_clusters"],
            facts["clips"],
            basis,
            statistics,
            facts["stale"],
        )


@dataclass
class Context:
    """What a step sees of the whole network.

    Attributes:
        network: the model as blocks.
        stream: brings a block's weights into memory (``stream.weights.hold``) and calls blocks.
        scheme: which tensor gets which `QuantSpec`.
        traces: links, roles and stages by block.
        statistics: of every Linear as the steps so far leave it; None when no step of the recipe captures them.
        ids: the calibration samples' tokens (samples, length), or None when no step needs any.
        batch_size: samples that pass together.
        samples: the calibration samples as they reach the present block, for `Step.apply`; None when no step captures them.
        rotary: by full name of such a module, the layout of its rotary embeddings, where a cache holds keys without them.
        attentions: full names of the modules that call transformers' attention interface, by block.
        steps: the steps so far, by name, in order.
        plans: what they have decided.
        outside: for `Step.plan_block`, what the same step's `plan_outside` has said.
        note: writes a line into the run's log.
        keep: makes what a pass of this name keeps of its finished blocks, or None where nothing is kept.
        rescaled: called with (full name, scale (in,)) when a solver has divided what the Linear reads by a scale.
        replaced: called with (full name, the Linear, the `QuantLinear` in its place), right after the replacement.
    """

    network: Network
    stream: BlockStream
    scheme: SchemeConfig
    traces: Mapping[int, Trace] = field(default_factory=dict)
    statistics: Statistics | None = None
    ids: torch.Tensor | None = None
    batch_size: int = 1
    samples: Samples | None = None
    attentions: Mapping[int, list[str]] = field(default_factory=dict)
    rotary: Mapping[str, str] = field(default_factory=dict)
    steps: "dict[str, Step]" = field(default_factory=dict)
    plans: dict[str, StepPlan] = field(default_factory=dict)
    outside: StepPlan = field(default_factory=StepPlan)
    note: Callable[[str], None] = lambda line: None
    keep: Callable[[str, list[Flow], Any], Kept | None] = lambda what, flows, visitor: None
    rescaled: Callable[[str, torch.Tensor], None] = lambda name, scale: None
    replaced: Callable[[str, nn.Module, QuantLinear], None] = lambda name, original, module: None

    def drawn(self, asker: str, count: int | None = None, shared: bool = False) -> Flow:
        """Opens the calibration samples, all or the first `count`, for `asker`, a place in the recipe.

        Where they are `shared`, each rank sees its own batches: whole leaves of the sums (`ptq.ranks.sample_sum`).

        Raises:
            UserError: when none were drawn.
        """
        if self.ids is None:
            raise _undrawn(asker)
        flow = self.stream.open(self.ids[:count], self.batch_size)
        if shared:
            flow.shared = shares(len(flow.ids), self.batch_size, self.stream.world.size, flow.leaf)
        return flow

    def samples_of(self, asker: str) -> Samples:
        """Returns the calibration samples as they reach the present block. Raises `UserError` when none were drawn."""
        if self.samples is None:
            raise _undrawn(asker)
        return self.samples

    @property
    def roles(self) -> dict[str, str]:
        """Query, key or value by full name of the Linear that computes it."""
        return {name: role for trace in self.traces.values() for name, role in trace.roles.items()}

    @property
    def labels(self) -> dict[str, torch.Tensor]:
        """Clusters of input channels by full name of a Linear, as the plans so far say."""
        return {name: labels for plan in self.plans.values() for name, labels in plan.labels.items()}

    @property
    def head_clusters(self) -> int:
        """Clusters of each head's query, key and value, or 0."""
        return max((plan.head_clusters for plan in self.plans.values()), default=0)

    @property
    def clips(self) -> dict[str, float]:
        """Shares of the inputs' ranges that are kept, by full name of a Linear, as the plans so far say."""
        return {name: share for plan in self.plans.values() for name, share in plan.clips.items()}

    def links(self, block: Block) -> list[Link]:
        """Returns the proved links of a block."""
        return self.traces[block.index].links if block.index in self.traces else []

    def sums(self, block: Block) -> dict[str, str]:
        """Returns `ptq.network.residual.find_sums` of a block: where its Linears' outputs are added to the residual stream."""
        return self.traces[block.index].sums if block.index in self.traces else {}

    def rests(self, block: Block) -> dict[str, str]:
        """Returns `ptq.network.residual.find_rests` of a block: by Linear of `sums`, which module reads what it is added to."""
        return self.traces[block.index].rests if block.index in self.traces else {}

    def norm_sums(self, block: Block) -> dict[str, str]:
        """Returns the same for the block's norms: those whose output is added to the residual stream."""
        return self.traces[block.index].norm_sums if block.index in self.traces else {}

    def weighed_sums(self, block: Block) -> dict[str, str]:
        """Returns the same for Linears whose output is weighed token by token first: those of experts, and what a gate weighs."""
        return self.traces[block.index].weighed_sums if block.index in self.traces else {}

    def stages(self, block: Block) -> list[tuple[str, ...]]:
        """Returns the block's Linears in the order of their calls, those that read one tensor together."""
        known = self.traces[block.index].stages if block.index in self.traces else []
        seen = {name for stage in known for name in stage}
        return known + [(name,) for name in block.linears if name not in seen]

    def module(self, name: str) -> Any:
        """Returns the module of that full name, as it stands now."""
        return self.network.model.get_submodule(name)

    @contextmanager
    def shown(self, block: Block) -> Iterator[None]:
        """Inside the context the block's weights are in memory as the steps so far leave them; then they are put back."""
        with self.stream.at(block), self.transformed(block):
            yield

    @contextmanager
    def transformed(self, block: Block) -> Iterator[None]:
        """As `shown`, for a block whose weights are in memory."""
        if not self.steps:
            yield
            return
        with put_back(self.network, block):
            for name, step in self.steps.items():
                step.apply(block, self.plans[name], self)
            for name, step in self.steps.items():
                step.finish(block, self.plans[name], self)
            yield

    def show(self, visitor: Visitor, flow: Flow, what: str) -> None:
        """Carries samples through the network as the steps so far leave it, for a step that plans.

        A visitor with ``write(block, path)`` and ``read(block, path)`` is taken up after its last finished block when the
        run is interrupted.
        """
        kept = self.keep(what, [flow], visitor) if hasattr(visitor, "write") else None
        self.stream.run([flow], _Shown(self, visitor), what, kept)


def _undrawn(asker: str) -> UserError:
    return UserError(f"{asker}: needs calibration samples, and none were drawn")


class _Shown:
    """Shows a visitor every block as the steps so far leave it."""

    def __init__(self, context: Context, visitor: Visitor):
        self._context, self._visitor = context, visitor
        self._held = ExitStack()

    def enter(self, block: Block) -> None:
        """Applies the steps so far, then lets the visitor enter."""
        self._held.enter_context(self._context.transformed(block))
        self._visitor.enter(block)

    def leave(self, block: Block) -> None:
        """Lets the visitor leave, then puts the block back."""
        try:
            self._visitor.leave(block)
        finally:
            self._held.close()


class Step:
    """One stage of a recipe. Its module holds a dataclass `Options` beside it, and one of `Transform` and `Solver` is its base.

    A step is made once and holds nothing but its options: what it has decided is in its `StepPlan`.
    """

    kind: ClassVar[str]
    acts: ClassVar[frozenset[str]] = frozenset()
    """Where the step acts, of `PLACES`."""
    proved: ClassVar[bool] = True
    """Whether a transform changes blocks and leaves what they compute as it is: one that computes something else on purpose is not proved,
    nor one that leaves the blocks alone."""
    by_block: ClassVar[bool] = False
    """Whether a block's part of the plan depends on nothing beyond what the block reads, and `plan_outside` knows what it does outside
    of them: then `plan_block` makes it, and a run whose weights are on disk need not see the network before its first block."""
    outdates: ClassVar[bool] = False
    """Of a step that plans `by_block`, whether its plans are `StepPlan.stale`: a step behind it that needs statistics needs a pass of its own."""
    last: ClassVar[bool] = False
    """Whether what it decides holds only for what the transforms before it leave: no transform may follow."""

    def __init__(self, options: Any):
        self.options = options

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Returns what this step needs from the calibration samples under `scheme`: `STATISTICS`, `SAMPLES`, `REFERENCE`."""
        return frozenset()

    def warned(self, scheme: SchemeConfig, acted: frozenset[str]) -> str | None:
        """Returns a sentence where theory and measurement agree that the step does harm after what was done before it; None otherwise.

        Args:
            scheme: the formats.
            acted: where the steps before it act, of `PLACES`.
        """
        return None

    def plan(self, context: Context) -> StepPlan:
        """Sees everything once, before the first block. `Context.shown` and `Context.show` apply the steps before it."""
        return StepPlan()

    def plan_outside(self, context: Context) -> StepPlan:
        """Returns what `plan` would have beyond the blocks: its `basis`, and what `outside` goes by; where a step plans `by_block`.

        Called before the first block is seen, whose links are not known yet; what lies outside the blocks is in memory as it was.
        """
        return StepPlan()

    def looks_at(self, context: Context) -> Flow | None:
        """Returns the samples that `plan_block` wants to see, before the first block, or None; where a step plans `by_block`."""
        return None

    def plan_block(self, block: Block, context: Context, flow: Flow | None) -> StepPlan:
        """Returns what `plan` would have for one block, whose weights are in memory as the steps before this one leave them.

        What `plan_outside` said, `Context.outside`, is not said again.

        Args:
            block: the block; its statistics are `Context.statistics`, which has no other's.
            context: as for `plan`; the plans of other steps are those for this block.
            flow: what `looks_at` gave, as it reaches the block; it passes the block afterwards.
        """
        raise TypeError(f"{type(self).__name__} does not plan block by block")

    def outside(self, plan: StepPlan, context: Context) -> None:
        """Changes what lies outside the blocks (embedding, final norm, head), whose weights are in memory.

        Parameters are replaced (`ptq.network.outside.set_weight`) and never written into: they may be tied, and are put back.
        """

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Changes one block whose weights are in memory; called once a block, in stream order."""
        raise TypeError(f"{type(self).__name__} does not say what it does to a block")

    def finish(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Does what a transform can only do when those after it have changed the block too."""


class Transform(Step):
    """A step that leaves what the network computes as it is; that is proved on every block."""

    kind: ClassVar[str] = TRANSFORM


class Solver(Step):
    """A step that replaces Linears by quantized ones."""

    kind: ClassVar[str] = SOLVER

    @property
    def weighs(self) -> bool:
        """Whether what it makes of a weight depends on the Hessian of what the Linear reads, and `quantized` says how."""
        return False

    def quantized(
        self, weight: torch.Tensor, hessian: torch.Tensor, formats: Mapping[str, QuantSpec]
    ) -> dict[str, torch.Tensor]:
        """Returns what it would make of one weight by itself in each of several formats, float32 (out, in); where it `weighs`.

        For who compares formats: what errors of the Linears before it ask of this one is not known there.

        Args:
            weight: (out, in); its rows may be those of several Linears with one input.
            hessian: H = 2 X^T X / n of that input, float32 (in, in).
            formats: by a name; each with scales of rows, or of the whole weight.
        """
        raise TypeError(f"{type(self).__name__} does not weigh errors")


@dataclass(frozen=True)
class Tuning:
    """What a tuner learns from.

    Attributes:
        flow: samples, each a batch, as they reach the first block of the quantized network, and how it calls its blocks for each.
        target: the unquantized network's final hidden states of the same samples, (samples, length, channels).
        started: what an interrupted run kept last, or None.
        keep: told what to go on from; called at moments between which little work is lost.
    """

    flow: Flow
    target: torch.Tensor
    started: Mapping[str, torch.Tensor] | None = None
    keep: Callable[[Mapping[str, torch.Tensor]], None] = lambda state: None


class Tuner(Step):
    """A step that changes the finished quantized network as a whole. Its `apply` puts what was learned into a block's modules."""

    kind: ClassVar[str] = TUNER

    def passes(self, samples: int) -> tuple[int, int]:
        """Returns how many samples pass forward and backward, and how many forward only, where it is given so many: for forecasts."""
        return samples, 0

    def tune(self, context: Context, tuning: Tuning) -> StepPlan:
        """Learns on all blocks together, whose weights are in memory and are the quantized ones; leaves them as they are."""
        raise TypeError(f"{type(self).__name__} does not say what it learns")
