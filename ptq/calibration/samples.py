"""The calibration samples as they reach the present block, for steps that look at them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ptq.network.attention import unquantized_attention
from ptq.network.block_stream import BlockStream, Flow
from ptq.network.experts.abreast import abreast
from ptq.network.network import Block
from ptq.network.replaced import hooked
from ptq.network.staged_pass import StagedPass
from ptq.ranks.sample_sum import sums_held
from quantize.modules.online import folded_inputs, online_input

Remembered = Callable[[Block, Callable[[], torch.Tensor]], torch.Tensor]
"""Returns what a function gives for a block: called now, or remembered since it was called for this block before."""
Watcher = Callable[[torch.Tensor, slice], None]
"""Called with the input of a module (..., channels), and which of all samples' tokens, one after another, these are."""


class _Seen(Exception):
    """Raised inside a block's forward when every watcher has seen its input."""


class Samples:
    """The calibration samples as they reach the present block: every earlier block is quantized already.

    `reference` carries the same samples through the unquantized blocks, where a step captures `REFERENCE`. With `unquantized` the
    samples are there for proofs of transforms alone, and go through the unquantized blocks themselves: what such a block gives for
    them in the proof's precision is what the proof compares with, and is the same for every run of the model.
    """

    def __init__(
        self,
        stream: BlockStream,
        flow: Flow,
        reference: Flow | None = None,
        unquantized: Remembered | None = None,
        parts: Flow | None = None,
    ):
        self.stream, self.flow, self.reference, self.unquantized = stream, flow, reference, unquantized
        self._parts = parts or flow
        self._kept: dict[int, torch.Tensor] = {}
        self._paused: StagedPass | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return self.flow.ids.numel()

    @torch.no_grad()
    def feed(self, block: Block, watchers: Mapping[str, Watcher], shared: bool = False) -> None:
        """Lets every batch pass through the block as it is now; the samples themselves stay where they are.

        Inside `stage_by_stage` nothing passes for what reads the tensor that the batches wait with, nor for what is remembered.

        Args:
            block: the present block, weights in memory.
            watchers: by full name of a module, what looks at its input; "" for the block's output. A batch stops at the
                last of them. They are called in the order of the modules, or in that of the mapping.
            shared: the watchers see this rank's batches only, and what they gather is added up (`ptq.calibration.sums`).
                Otherwise they see all batches, in order, on every rank.
        """
        # What a step has freed since the last pass lies in holes that the next one's tensors fit only in part.
        self.stream.weights.tidy()
        if self._paused is not None and watchers and self._is_there(self._paused, watchers, shared):
            for rows, x in self._paused.inputs() if shared else self._paused.all_inputs():
                tokens = _tokens(self.flow, rows)
                for name, watcher in watchers.items():
                    watcher(x if name in self._paused.stage else self._paused.read(rows, name), tokens)
            return
        for i, rows in self.stream.own(self.flow) if shared else self.flow.slices():
            self._pass(self.flow, block, i, rows, watchers)
        self.stream.count_experts(self.flow)

    def _is_there(self, paused: StagedPass, watchers: Mapping[str, Watcher], shared: bool) -> bool:
        """Whether all that is watched is what the batches wait with, or what is remembered of them."""
        alone = shared or self.flow.shared is None
        return all(name in paused.stage or (alone and paused.has_read(name)) for name in watchers)

    @torch.no_grad()
    def carry(self, block: Block, watchers: Mapping[str, Watcher]) -> None:
        """As `feed`, for a block that stays as it is: its outputs are kept for the stream, which need not call it again.

        Of samples that ranks share, the watchers see this rank's batches.
        """
        self.flow.ahead[block.index] = {
            i: self._pass(self.flow, block, i, rows, watchers, whole=True) for i, rows in self.stream.own(self.flow)
        }

    @contextmanager
    def stage_by_stage(
        self, block: Block, stages: Sequence[tuple[str, ...]], remember: Collection[str] = ()
    ) -> Iterator[Iterator[list[tuple[str, ...]]]]:
        """Gives the stages in order, those together that need nothing of one another, for a solver that replaces their Linears
        before it asks for the next.

        With hidden states in memory the samples pass once for all stages, which come one by one, and their outputs are kept for the
        stream; not so through a mixture whose experts are brought into memory one by one. Otherwise every `feed` is a pass of its own,
        and only the hidden states are held: the experts of a mixture come together.

        Args:
            block: the present block, weights in memory.
            stages: full names of the Linears that read one tensor, in the order of their calls.
            remember: full names of modules whose inputs may be watched when the batches have passed them.
        """
        whole = self.stream.weights.resident or not block.mixtures
        if not (whole and self.stream.hidden_states == "memory" and stages):
            yield iter(abreast(block, stages, sums_held(len(self.flow.hidden))))
            return
        with StagedPass(self.stream, self.flow, block, stages, remember) as paused:
            self._paused = paused
            try:
                yield self._advanced(paused, stages)
                paused.finish()
            finally:
                self._paused = None

    def pairs(self, block: Block) -> "Pairs":
        """Returns what a method learns from: what reaches the block now, and what the unquantized block gave.

        That is the output of the unquantized network's block on the same samples where a step captures `REFERENCE`, else
        this block's own on what reaches it now. To be called once a block, before its Linears are replaced.
        """
        if self.reference is not None:
            targets = self.advance_reference(block, [""])[""].view_as(self.flow.hidden)
            return Pairs(self.stream, self.flow, block, targets, self._parts)
        targets = self.stream.allocate(tuple(self.flow.hidden.shape), self.flow.hidden)
        with torch.no_grad(), unquantized_attention(block):
            for i, rows in self.stream.own(self.flow):
                targets[rows].copy_(
                    self.stream.call(self.flow, block, i, self.flow.hidden[rows].to(self.stream.device))
                )
        self.stream.spread(self.flow, targets)
        return Pairs(self.stream, self.flow, block, targets, self._parts)

    @torch.no_grad()
    def advance_reference(self, block: Block, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Carries the reference samples through the block, which is not quantized yet.

        Returns:
            The inputs (tokens of all samples, channels) of the modules `names`, and the block's output for the name "", in
            memory or memory-mapped as the execution asks for hidden states; they are overwritten by the next call. Of the
            inputs each rank has its own batches' only.

        Raises:
            ValueError: when no step captures `REFERENCE`.
        """
        reference = self.reference
        if reference is None:
            raise ValueError("no step captures the reference samples")
        kept: dict[str, torch.Tensor] = {}

        def keep(place: int, name: str, x: torch.Tensor, tokens: slice) -> None:
            shape = (reference.ids.numel(), x.shape[-1])
            held = self._kept.get(place)
            moved = held is not None and self.stream.hidden_states == "memory" and held.device != x.device
            if held is None or held.shape != shape or moved:
                self._kept[place] = self.stream.allocate(shape, x)
            kept[name] = self._kept[place]
            kept[name][tokens].copy_(x.reshape(-1, x.shape[-1]))

        watchers = {name: partial(keep, place, name) for place, name in enumerate(names) if name}
        with unquantized_attention(block), folded_inputs(_unwatched(block, names)):
            for i, rows in self.stream.own(reference):
                reference.hidden[rows].copy_(self._pass(reference, block, i, rows, watchers, whole=True))
        self.stream.spread(reference, reference.hidden)
        if "" in names:
            kept[""] = reference.hidden.flatten(0, 1)
        return kept

    def _advanced(self, paused: StagedPass, stages: Sequence[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
        for stage in stages:
            paused.advance()
            self.stream.count_experts(self.flow)
            yield [stage]

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
        hidden = flow.hidden[rows].to(self.stream.device)
        hooks = (model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watchers if name)
        with hooked(hooks), suppress(_Seen):
            output = self.stream.call(flow, block, batch, hidden)
            if "" in watchers:
                watchers[""](output, tokens)
            return output
        return hidden


@dataclass(frozen=True)
class Pair:
    """One batch of samples at a block: `hidden` (samples, length, channels) reaches it now, `target` is to come out."""

    hidden: torch.Tensor
    target: torch.Tensor
    output: Callable[[], torch.Tensor]
    """Calls the block as it stands for `hidden`; with gradients where they are enabled."""


class Pairs:
    """What reaches a block and what is to come out of it, batch by batch, in any order, as often as a method wants.

    Attributes:
        world: the ranks, all of which have all pairs.
    """

    def __init__(self, stream: BlockStream, flow: Flow, block: Block, targets: torch.Tensor, parts: Flow):
        self._stream, self._flow, self._block, self._targets, self._parts = stream, flow, block, targets, parts
        self._slices = list(flow.slices())
        self.world = stream.world

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[Pair]:
        return self.batches()

    def batches(self, seed: int | None = None, only: Sequence[int] | None = None) -> Iterator[Pair]:
        """Yields the batches.

        Args:
            seed: of their order; None for the order of the samples.
            only: numbers of the batches to yield, so that some can be held out; None for all.
        """
        numbers = range(len(self)) if only is None else only
        for number in numbers if seed is None else shuffled(numbers, seed):
            yield self._pair(self._flow, *self._slices[number])

    def parts(self, number: int) -> range:
        """Returns the numbers of the parts of that batch, whose gradients ranks share (`ptq.ranks.gradient_sum`)."""
        rows, size = self._slices[number][1], self._parts.batch_size
        return range(rows.start // size, -(-min(rows.stop, len(self._flow.ids)) // size))

    def values(self, number: int) -> int:
        """Returns how many values that batch's output has."""
        return self._targets[self._slices[number][1]].numel()

    def part(self, number: int) -> Pair:
        """Returns the pair of one part of a batch."""
        size = self._parts.batch_size
        return self._pair(self._parts, number, slice(number * size, (number + 1) * size))

    def _pair(self, flow: Flow, index: int, rows: slice) -> Pair:
        hidden = self._flow.hidden[rows].to(self._stream.device)
        target = self._targets[rows].to(self._stream.device)
        return Pair(hidden, target, partial(self._stream.call, flow, self._block, index, hidden))


def shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    """Returns numbers of batches in the order that a seed gives them."""
    drawn = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    return [numbers[i] for i in drawn]


def _unwatched(block: Block, names: Sequence[str]) -> list[nn.Module]:
    """Returns the block's Linears whose inputs nobody looks at behind what acts on them online."""
    seen = {id(online_input(block.linears[name])) for name in names if name in block.linears}
    return [linear for linear in block.linears.values() if id(online_input(linear)) not in seen]


def _tokens(flow: Flow, rows: slice) -> slice:
    """Returns which of all samples' tokens, one after another, those of a batch are."""
    length = flow.ids.shape[1]
    return slice(rows.start * length, min(rows.stop, len(flow.ids)) * length)
