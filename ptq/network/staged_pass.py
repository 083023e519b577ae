"""One pass of many batches through a block that waits where a solver wants to look, and goes on through quantized Linears."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from ptq.network.block_stream import BlockStream, Flow
from ptq.network.network import Block, replaced_forward
from ptq.network.replaced import hooked
from ptq.ranks.world import Message


@dataclass
class _Batch:
    """One batch under way, by its number: where it waits, and with what; its output when it has come to the end."""

    index: int
    rows: slice
    call: greenlet
    stage: int = -1
    tensor: torch.Tensor | None = None
    seen: set[int] = field(default_factory=set)
    read: dict[str, torch.Tensor] = field(default_factory=dict)
    """What modules have read that are to be remembered, by their full names."""

    def resume(self, *given: Any) -> None:
        """Goes on to the next stage, or to the end of the block."""
        # What it waited with is let go first: two stages' worth of all batches is never held.
        self.tensor = None
        self.stage, self.tensor = self.call.switch(*given)


class StagedPass:
    """Carries every batch of a flow, of which each rank has its own, through a block once, in as many goes as the block has stages.

    The model's code is not cut up for that: each batch's call of the block is a coroutine (a greenlet) that is left where it
    calls the first Linear of a stage, and entered again when the Linears of that stage have been replaced. What the batches
    hold between two stages stays in memory until then. The numbers are those of a pass that starts over for every stage.

    Use as a context: leaving it gives up what has not been finished.

    Args:
        stream: calls the block.
        flow: the samples; `flow.hidden` stays as it is.
        block: the block, weights in memory.
        stages: full names of the Linears that read one tensor together, in the order of their calls.
        remember: full names of modules whose inputs are remembered until the batch has passed the block.
    """

    def __init__(
        self,
        stream: BlockStream,
        flow: Flow,
        block: Block,
        stages: Sequence[tuple[str, ...]],
        remember: Collection[str] = (),
    ):
        self._stream, self._flow, self._block, self._stages = stream, flow, block, list(stages)
        self._at = -1
        self._batches: list[_Batch] = []
        self._modules = [stream.network.model.get_submodule(stage[0]) for stage in stages]
        self._plain: list[Callable[..., Any]] = [module.forward for module in self._modules]
        self._remember = sorted(remember)
        self._around = ExitStack()

    def __enter__(self) -> "StagedPass":
        self._around.enter_context(replaced_forward(self._modules, self._wait))
        modules = {name: self._stream.network.model.get_submodule(name) for name in self._remember}
        self._around.enter_context(
            hooked(module.register_forward_pre_hook(self._look(name)) for name, module in modules.items())
        )
        self._batches = [_Batch(i, rows, greenlet(self._call)) for i, rows in self._stream.own(self._flow)]
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            for batch in self._batches:
                if batch.call:
                    batch.call.throw(GreenletExit)
        finally:
            self._batches = []
            self._around.close()

    @property
    def stage(self) -> tuple[str, ...]:
        """The Linears that the batches are about to call; empty before the first `advance`."""
        return self._stages[self._at] if self._at >= 0 else ()

    def inputs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields (its rows of the flow, what the Linears of the present stage read) of every batch of this rank that comes to them."""
        for batch in self._here():
            if batch.tensor is not None:
                yield batch.rows, batch.tensor

    def all_inputs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the same of every batch of all ranks, in order."""
        if self._flow.shared is None:
            yield from self.inputs()
            return
        world, here = self._stream.world, {rows.start: x for rows, x in self.inputs()}
        for rank, batches in enumerate(self._flow.shared):
            for i, rows in self._flow.slices():
                if i in batches:
                    own = {"input": here[rows.start]} if rows.start in here else {}
                    found = world.broadcast(Message(tensors=own), rank).tensors
                    if found:
                        yield rows, found["input"].to(self._stream.device)

    def has_read(self, name: str) -> bool:
        """Returns whether `read` can be asked: every batch of this rank that waits has passed the module `name`, which is remembered."""
        return all(name in batch.read for batch in self._here())

    def read(self, rows: slice, name: str) -> torch.Tensor:
        """Returns what the module of this name has read of the batch of these rows."""
        return next(batch for batch in self._here() if batch.rows == rows).read[name]

    @torch.no_grad()
    def advance(self) -> None:
        """Takes every batch to the next stage, or beyond where it does not call that."""
        self._at += 1
        for batch in self._batches:
            if batch.stage < self._at:
                batch.resume(*((batch.index, batch.rows) if batch.stage < 0 else ()))

    @torch.no_grad()
    def finish(self) -> None:
        """Takes every batch to the end of the block; the next `BlockStream.step` of this block takes the outputs."""
        while self._at < len(self._stages):
            self.advance()
        self._flow.ahead[self._block.index] = {b.index: b.tensor for b in self._batches if b.tensor is not None}

    def _call(self, index: int, rows: slice) -> tuple[int, torch.Tensor]:
        hidden = self._flow.hidden[rows].to(self._stream.device)
        return len(self._stages), self._stream.call(self._flow, self._block, index, hidden)

    def _here(self) -> Iterator[_Batch]:
        """Yields this rank's batches that have come to the present stage."""
        return (batch for batch in self._batches if batch.stage == self._at)

    def _own(self) -> _Batch | None:
        """Returns the batch whose call this is; None where others come by meanwhile: another flow, or a pass that starts over."""
        here = getcurrent()
        return next((batch for batch in self._batches if batch.call is here), None)

    def _look(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """The hook that remembers what a module reads, for the batch that calls it."""

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            own = self._own()
            if own is not None and args and isinstance(args[0], torch.Tensor):
                own.read.setdefault(name, args[0])

        return look

    def _wait(self, stage: int) -> Callable[..., Any]:
        """The forward of the first Linear of a stage: waits, then does what stands in its place by then."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = self._own()
            if own is not None and stage not in own.seen:
                if stage < self._at:
                    raise RuntimeError(f"{self._stages[stage][0]} is called in another order than {self._stages}")
                own.seen.add(stage)
                own.call.parent.switch((stage, args[0]))
            now: nn.Module = self._stream.network.model.get_submodule(self._stages[stage][0])
            # The hooks of the first one, online transforms among them, act around this call: those that its successor has
            # taken over from it are not to act a second time.
            return (self._plain[stage] if now is self._modules[stage] else now.forward)(*args, **kwargs)

        return forward
