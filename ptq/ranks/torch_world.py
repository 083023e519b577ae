"""Ranks that ``torchrun`` has started: torch.distributed, by gloo on CPUs and NCCL where every rank has a GPU of its own."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from ptq.errors import UserError
from ptq.ranks.torchrun import ranks_asked_for
from ptq.ranks.world import ALONE, Message, World

LONGEST = timedelta(days=2)
"""How long a rank waits for another: one that dies is seen at once, one that computes may take long."""


@contextlib.contextmanager
def open_world(device: str) -> Iterator[World]:
    """Gives the ranks of this run: those that ``torchrun`` has started, else this process alone.

    Args:
        device: ``execution.device``; where it is CUDA each rank takes a GPU by its number on its machine.

    Raises:
        UserError: when the others cannot be reached.
    """
    if ranks_asked_for() == 1:
        yield ALONE
        return
    wanted = torch.cuda.is_available() and device in {"auto", "cuda"}
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() if wanted else 0
    if there:
        torch.cuda.set_device(local % there)
    own = there >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        distributed.init_process_group("nccl" if own else "gloo", timeout=LONGEST)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"ranks: the others cannot be reached ({_line(error)}): start all of them by torchrun"
        ) from None
    place = torch.device("cuda", torch.cuda.current_device()) if own else torch.device("cpu")
    try:
        yield TorchWorld(distributed.get_rank(), distributed.get_world_size(), place)
    finally:
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


class TorchWorld:
    """The ranks of torch's default process group.

    Every method raises `UserError`, in one line, when another rank has ended.

    Args:
        rank: this process.
        size: how many there are.
        place: where tensors have to be for the group's backend.
    """

    def __init__(self, rank: int, size: int, place: torch.device):
        self.rank, self.size, self._place = rank, size, place

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, message: Message | None, source: int = 0) -> Message:
        """See `World`."""
        with self._reached():
            given = message if self.rank == source else None
            return self._pass(given, lambda tensor: distributed.broadcast(tensor, source))

    def gather(self, message: Message, to: int | None = None) -> Iterator[Message]:
        """See `World`."""
        if to is not None and self.rank != to:
            with self._reached():
                self._pass(message, lambda tensor: distributed.send(tensor, to))
            return
        for source in range(self.size):
            if source == self.rank and to is not None:
                yield message
                continue
            yield self.broadcast(message, source) if to is None else self._received(source)

    def fill(self, tensor: torch.Tensor, source: int) -> None:
        """See `World`."""
        if not tensor.numel():
            return
        with self._reached():
            held = tensor.to(self._place)
            distributed.broadcast(_bytes(held), source)
            if held is not tensor:
                tensor.copy_(held)

    def all(self, flag: torch.Tensor) -> torch.Tensor:
        """See `World`."""
        with self._reached():
            held = flag.to(self._place, torch.uint8)
            distributed.all_reduce(held, distributed.ReduceOp.MIN)
            return held.to(flag.device, torch.bool)

    def _received(self, source: int) -> Message:
        with self._reached():
            return self._pass(None, lambda tensor: distributed.recv(tensor, source))

    def _pass(self, message: Message | None, move: Callable[[torch.Tensor], Any]) -> Message:
        """Moves a message that is given, or takes one: first the length of its header, the header, then the tensors."""
        if message is None:
            length = torch.zeros(1, dtype=torch.int64, device=self._place)
            move(length)
            text = torch.empty(int(length), dtype=torch.uint8, device=self._place)
            move(text)
            facts, described = json.loads(text.cpu().numpy().tobytes())
            tensors = {}
            for name, dtype, shape in described:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self._place)
                if tensors[name].numel():
                    move(_bytes(tensors[name]))
            return Message(facts, tensors)
        described = [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in message.tensors.items()]
        text = torch.frombuffer(bytearray(json.dumps([message.facts, described]).encode()), dtype=torch.uint8)
        move(torch.tensor([len(text)], device=self._place))
        move(text.to(self._place))
        for tensor in message.tensors.values():
            if tensor.numel():
                move(_bytes(tensor.detach().to(self._place).contiguous()))
        return message

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"ranks: another rank has ended, so rank {self.rank} ends too ({_line(error)}); what was finished is kept, "
                "and the same command takes it up, with as many ranks as you like"
            ) from None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
