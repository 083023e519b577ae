"""The block stream: the one loop that carries hidden states of many samples through a network, block by block."""

import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ptq.files.scratch import ScratchFolder, reserve
from ptq.models.weights import Weights
from ptq.network.experts.routing import ROUTED, ExpertTokens, routed_by
from ptq.network.network import Block, Network, first_tensor, replaced_forward
from ptq.network.outside import OutsideState
from ptq.network.stream.calls import Call, Moved
from ptq.network.stream.calls import shared as shared_calls
from ptq.ranks.sample_sum import leaf_of, shares
from ptq.ranks.world import ALONE, Message, World
from quantize.kernels.matmul import fast_linears

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total): blocks of a pass of that name, or `STEPS` of what learns on all of them."""
STEPS = "steps"
Head = Callable[[torch.Tensor], torch.Tensor]
"""From final hidden states (batch, tokens, channels) to logits (batch, tokens, vocabulary)."""


class Visitor(Protocol):
    """What looks at, or changes, a block while samples pass through it."""

    def enter(self, block: Block) -> None:
        """Called when the block's weights are in memory, before the samples pass through it."""

    def leave(self, block: Block) -> None:
        """Called after all samples have passed through it, before its weights may go."""


class Nothing:
    """The visitor that only lets the samples pass."""

    def enter(self, block: Block) -> None:
        """Does nothing."""

    def leave(self, block: Block) -> None:
        """Does nothing."""

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes an empty file: hidden states are all that there is to keep."""
        path.touch()

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Does nothing."""


class Kept(Protocol):
    """What a pass keeps of its finished blocks, so that it can be taken up after the last of them."""

    def take_up(self, blocks: Sequence[Block]) -> int:
        """Puts hidden states and the visitor's results back; returns how many blocks are done."""

    def keep(self, block: Block) -> None:
        """Keeps a finished block."""

    def hand_over(self, blocks: Sequence[Block], folder: pathlib.Path) -> None:
        """Copies the files of the finished blocks into a folder."""


@dataclass
class Flow:
    """The samples under way: `hidden` (samples, length, channels) and, for each batch, the recorded call of every block.

    With `exact` the Linears round as torch's own do; otherwise they may be faster. `ahead` has the outputs of a block, by number
    of the batch, where a pass of a step has computed them already. Where batches are `shared` out among ranks, each carries its own,
    and all have the hidden states of all when they have passed a block.
    """

    ids: torch.Tensor
    batch_size: int
    hidden: torch.Tensor
    exact: bool = False
    calls: list[list[Call]] = field(default_factory=list)
    experts: ExpertTokens | None = None
    """What experts see of these samples, for calibration; None for what the router chooses, not counted."""
    ahead: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    finite: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whether all was finite that came out of the embedding ("") and of each block, by name: bool, not waited for."""
    shared: list[range] | None = None
    """Numbers of the batches of each rank; None where every rank carries all of them."""
    passed: Callable[[Block], None] = lambda block: None
    """Called, on every rank, when its samples have passed a block."""
    moved: Moved = field(default_factory=dict)

    @property
    def leaf(self) -> int:
        """Samples whose sums one rank makes."""
        return leaf_of(len(self.ids))

    def note_finite(self, place: str, output: torch.Tensor) -> None:
        """Notes whether a batch of what came out of `place` was finite: one look at it, and no wait for the device."""
        ends = torch.stack(torch.aminmax(output)) if output.numel() else output.new_zeros(1)
        found = torch.isfinite(ends).all()
        self.finite[place] = self.finite[place] & found if place in self.finite else found

    def first_nonfinite(self) -> str | None:
        """Returns where NaN or inf began: "embedding", the first block's full name, or None where all has been finite.

        Of the blocks that this flow has passed, in their order; waits for the device.
        """
        if not self.finite:
            return None
        first, *others = self.finite.values()
        bad = ~torch.stack([first, *(found.to(first.device) for found in others)])
        return next((name or "embedding" for name, found in zip(self.finite, bad.tolist(), strict=True) if found), None)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Yields (index of the batch, its rows) of all batches."""
        for i, start in enumerate(range(0, len(self.ids), self.batch_size)):
            yield i, slice(start, start + self.batch_size)


_PASSING: ContextVar[tuple[Flow, slice] | None] = ContextVar("ptq-passing", default=None)


def passing() -> tuple[Flow, slice]:
    """Returns which rows of which flow pass a block now, for hooks inside it.

    Raises:
        LookupError: when none does.
    """
    found = _PASSING.get()
    if found is None:
        raise LookupError("no batch passes a block now")
    return found


@contextmanager
def _passing(flow: Flow, rows: slice) -> Iterator[None]:
    """As `routed_by`, for this thread and this greenlet."""
    token = _PASSING.set((flow, rows))
    try:
        yield
    finally:
        _PASSING.reset(token)


class _Done(Exception):
    """Raised inside the model's forward when the last block has been called: the head is not wanted."""


class BlockStream:
    """Carries flows through the blocks of `network` whose parameters `weights` brings into memory.

    The model's own forward computes what comes before the blocks and how each is called (masks, rotary embeddings,
    sliding windows), and what comes after them: no architecture is spelled out here.

    Args:
        network: the model as blocks.
        weights: resident or offloaded parameters.
        device: where the arithmetic happens.
        devices: those that blocks are computed on in turn, `device` first, where weights are not resident; none for that alone.
        hidden_states: ``memory``, or ``disk`` for a memory-mapped file.
        progress: called after every block of every flow.
        world: the ranks that share the samples.
    """

    def __init__(
        self,
        network: Network,
        weights: Weights,
        device: torch.device,
        hidden_states: str = "memory",
        progress: Progress | None = None,
        world: World = ALONE,
        devices: Sequence[torch.device] = (),
    ):
        self.network, self.weights, self.hidden_states = network, weights, hidden_states
        self.device, self.devices = device, tuple(devices) or (device,)
        weights.take_apart(network.pieces)
        if len(self.devices) > 1:
            weights.spread({block.name: self.device_of(block) for block in network.blocks})
        self.progress = progress or (lambda what, done, total: None)
        self.world = world
        self.experts = ROUTED
        """What calibration samples show to experts: `ExpertTokens.mode`."""
        self.outside: list[Callable[[], None]] = []
        """What the transforms do to embedding, final norm and head, in order; done each time that these are held."""
        self._scratch: list[ScratchFolder] = []

    def close(self) -> None:
        """Removes the memory-mapped files."""
        for folder in self._scratch:
            folder.cleanup()
        self._scratch.clear()

    def device_of(self, block: Block) -> torch.device:
        """Returns where a block is computed."""
        return self.devices[block.index % len(self.devices)]

    @contextmanager
    def at(self, block: Block) -> Iterator[None]:
        """Inside the context the block's weights are in memory, and `device` is where it is computed."""
        with self.weights.hold([block.name]):
            before, self.device = self.device, self.device_of(block)
            try:
                yield
            finally:
                self.device = before

    @contextmanager
    def hold_outside(self, changed: bool = True) -> Iterator[None]:
        """Inside the context what lies outside the blocks is in memory, `changed` as the transforms leave it or as it was."""
        with self.weights.hold(self.network.outside):
            before = OutsideState.of(self.network)
            try:
                for change in self.outside if changed else ():
                    change()
                yield
            finally:
                before.put_back()

    def change_outside(self) -> None:
        """Changes what lies outside the blocks for good, where weights are resident: the model is quantized now."""
        if self.weights.resident:
            for change in self.outside:
                change()
            self.outside.clear()

    @torch.no_grad()
    def open(
        self,
        ids: torch.Tensor,
        batch_size: int,
        exact: bool = False,
        changed: bool = True,
        positions: torch.Tensor | None = None,
        shared: bool = False,
    ) -> Flow:
        """Runs what comes before the blocks on `ids` (samples, length) and records how the model calls each block.

        What is evaluated is to be `exact`: the bits that the model gives outside of the stream. `changed`: see `hold_outside`.
        `positions` (1, length): those of the tokens, where they do not begin at 0. `shared`: ranks share the batches; whoever
        looks at modules while they pass sees this rank's only.
        """
        flow: Flow | None = None
        with self.hold_outside(changed):
            for start in range(0, len(ids), batch_size):
                first, calls = self.record(ids[start : start + batch_size], positions)
                if flow is None:
                    shape = (len(ids), *first.shape[1:])
                    flow = Flow(ids, batch_size, self.allocate(shape, first), exact)
                flow.hidden[start : start + batch_size].copy_(first)
                flow.note_finite("", first)
                flow.calls.append(shared_calls(flow.calls[-1] if flow.calls else None, calls))
        if flow is None:
            raise ValueError("no samples to carry through the network")
        if shared:
            flow.shared = shares(len(ids), batch_size, self.world.size)
        return flow

    def calibration(self, ids: torch.Tensor, batch_size: int, shared: bool = False) -> Flow:
        """Runs what comes before the blocks on calibration samples (samples, length), of which experts see what `experts` says.

        Where they are `shared`, whoever sums what they give uses `ptq.ranks.sample_sum`: no rank has a part of a leaf.
        """
        flow = self.open(ids, batch_size)
        if shared:
            flow.shared = shares(len(ids), batch_size, self.world.size, flow.leaf)
        if any(block.mixtures for block in self.network.blocks):
            own = None if flow.shared is None else flow.shared[self.world.rank]
            flow.experts = ExpertTokens(self.experts, len(ids), ids.shape[1], own=own)
        return flow

    def own(self, flow: Flow) -> Iterator[tuple[int, slice]]:
        """Yields (index of the batch, its rows) of the batches that this rank carries."""
        for i, rows in flow.slices():
            if flow.shared is None or i in flow.shared[self.world.rank]:
                yield i, rows

    def spread(self, flow: Flow, tensor: torch.Tensor) -> None:
        """Gives all ranks what each has put into the rows of its own batches in `tensor` (samples, ...)."""
        for rank, batches in enumerate(flow.shared or ()):
            self.world.fill(tensor[batches.start * flow.batch_size : batches.stop * flow.batch_size], rank)

    def count_experts(self, flow: Flow) -> None:
        """Adds up what experts have seen on all ranks; called when the samples have passed, or have come to a place in a block."""
        if flow.experts is None or flow.shared is None:
            return
        fresh = flow.experts.take_fresh()
        for message in self.world.gather(Message(tensors=fresh)):
            flow.experts.add(message.tensors)

    @torch.no_grad()
    def run(self, flows: Sequence[Flow], visitor: Visitor, what: str = "blocks", kept: Kept | None = None) -> None:
        """Carries every flow through every block, once, in order; `visitor` is called around each block.

        With `kept` the pass goes on after the blocks that an interrupted one has finished.
        """
        total = len(self.network.blocks)
        done = 0 if kept is None else kept.take_up(self.network.blocks)
        for block in self.network.blocks[done:]:
            with self.at(block):
                self.weights.prefetch([b.name for b in self.network.blocks[block.index + 1 : block.index + 2]])
                with fast_linears():
                    visitor.enter(block)
                for flow in flows:
                    self.step(flow, block)
                if kept is not None:
                    kept.keep(block)
                visitor.leave(block)
            self.progress(what, block.index + 1, total)

    def step(self, flow: Flow, block: Block) -> None:
        """Carries one flow through one block whose weights are in memory; `flow.hidden` is overwritten."""
        ahead = flow.ahead.pop(block.index, None)
        with fast_linears(not flow.exact):
            for i, rows in self.own(flow):
                output = ahead[i] if ahead else self.call(flow, block, i, flow.hidden[rows].to(self.device))
                flow.hidden[rows].copy_(output)
                flow.note_finite(block.name, output)
        if flow.shared is not None:
            self.spread(flow, flow.hidden)
            flow.finite[block.name] = self.world.all(
                flow.finite.get(block.name, torch.tensor(True, device=self.device))
            )
            self.count_experts(flow)
        flow.passed(block)

    def call(self, flow: Flow, block: Block, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the block's output for `hidden`, called as the model called it for batch number `batch`."""
        call = self.recorded(flow, block, batch)
        choice = flow.experts.choice(block.name, batch) if flow.experts is not None and block.mixtures else None
        rows = slice(batch * flow.batch_size, min((batch + 1) * flow.batch_size, len(flow.ids)))
        with _passing(flow, rows), routed_by(choice) if choice is not None else nullcontext():
            return first_tensor(block.module(hidden, *call.args, **call.kwargs))

    def recorded(self, flow: Flow, block: Block, batch: int) -> Call:
        """Returns how the model called the block for batch number `batch`, on the block's device."""
        call = flow.calls[batch][block.index]
        return call if len(self.devices) == 1 else call.on(self.device_of(block), flow.moved)

    @contextmanager
    def head(self, changed: bool = True) -> Iterator[Head]:
        """Gives a function from final hidden states (batch, tokens, channels) to logits (batch, tokens, vocabulary).

        The model's own forward does it, with the blocks stepped over, so scaled or capped logits come out as the
        model means them. What follows the blocks works token by token, hence any chunk of tokens may be asked for.
        `changed`: see `hold_outside`.
        """
        given: list[torch.Tensor] = []

        def step_over(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._wrap(given[-1])

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            given[:] = [hidden.to(self.device)]
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            return self.network.model(input_ids=ids, use_cache=False).logits

        modules = [block.module for block in self.network.blocks]
        with torch.no_grad(), self.hold_outside(changed), replaced_forward(modules, step_over):
            yield logits

    @contextmanager
    def heads(self) -> Iterator[tuple[Head, Head]]:
        """Gives the head of the network as it was, and that of the network as the transforms leave it: one where these do
        not reach outside the blocks.
        """
        if not self.outside:
            with self.head() as head:
                yield head, head
            return
        with self.head(changed=False) as head:
            before = OutsideState.of(self.network)
            for change in self.outside:
                change()
            after = OutsideState.of(self.network, before.held)

            def under(state: OutsideState) -> Head:
                def logits(hidden: torch.Tensor) -> torch.Tensor:
                    state.put_back()
                    return head(hidden)

                return logits

            yield under(before), under(after)

    def _wrap(self, hidden: torch.Tensor) -> Any:
        return (hidden, None) if self.network.returns_tuple else hidden

    def record(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Call]]:
        """Returns what reaches the first block (samples, length, channels), and how the model calls each; `hold_outside` is around it."""
        ids = ids.to(self.device)
        if self.network.returns_tuple is None:
            # A block returns a tensor or a tuple; the model's code shows which, by what reaches the second block.
            for guess in (False, True):
                self.network.returns_tuple = guess
                first, calls, intact = self._pass(ids, positions)
                if intact:
                    return first, calls
            self.network.returns_tuple = None
            raise RuntimeError("hidden states do not pass from block to block unchanged: this model cannot be streamed")
        first, calls, _ = self._pass(ids, positions)
        return first, calls

    def _pass(self, ids: torch.Tensor, positions: torch.Tensor | None) -> tuple[torch.Tensor, list[Call], bool]:
        first: list[torch.Tensor] = []
        calls: list[Call] = []
        intact = [True]
        last = len(self.network.blocks) - 1
        given = {} if positions is None else {"position_ids": positions.to(self.device)}

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if not first:
                    first.append(hidden)
                if not isinstance(hidden, torch.Tensor) or hidden.shape != first[0].shape:
                    intact[0] = False
                    raise _Done
                calls.append(Call(tuple(args[1:]), kwargs))
                if index == last:
                    raise _Done
                return self._wrap(hidden)

            return forward

        with replaced_forward([block.module for block in self.network.blocks], record), suppress(_Done):
            self.network.model(input_ids=ids, use_cache=False, **given)
        return first[0], calls, intact[0]

    def allocate(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Returns room for hidden states, in memory or in a memory-mapped file as `hidden_states` says, not initialised.

        Raises:
            UserError: when the disk has no room for the file.
        """
        if self.hidden_states == "memory":
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        folder = ScratchFolder("ptq-hidden")
        self._scratch.append(folder)
        size, path = math.prod(shape), folder.path / "hidden.bin"
        reserve(path, size * like.element_size())
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)
