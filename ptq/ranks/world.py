"""The processes of a run as each of them sees them: a rank, how many there are, and what they tell one another."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from ptq.errors import UserError

T = TypeVar("T")


class SaidElsewhere(UserError):
    """Raised on the other ranks for what rank 0 tells the user."""

    said_elsewhere = True


@dataclass(frozen=True)
class Message:
    """What one rank tells others: plain facts, as JSON holds them, and tensors by name."""

    facts: Any = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class World(Protocol):
    """The ranks of a run. All of them run the same program and call these methods in the same order.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this rank writes the results: rank 0 does."""

    def broadcast(self, message: Message | None, source: int = 0) -> Message:
        """Returns the message of rank `source`, which gives it; what the others give is not looked at."""

    def gather(self, message: Message, to: int | None = None) -> Iterator[Message]:
        """Yields the messages of all ranks in their order, one at a time, on rank `to`, or on all; nothing on the others.

        To be read to its end by every rank.
        """

    def fill(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrites a contiguous tensor with that of rank `source`."""

    def all(self, flag: torch.Tensor) -> torch.Tensor:
        """Returns whether a flag, a bool tensor of no dimension, is true on all ranks."""


class Alone:
    """One process: the default."""

    rank, size, leads = 0, 1, True

    def broadcast(self, message: Message | None, source: int = 0) -> Message:
        """Returns the message."""
        return message or Message()

    def gather(self, message: Message, to: int | None = None) -> Iterator[Message]:
        """Yields the message."""
        yield message

    def fill(self, tensor: torch.Tensor, source: int) -> None:
        """Does nothing."""

    def all(self, flag: torch.Tensor) -> torch.Tensor:
        """Returns the flag; no wait for the device."""
        return flag


ALONE: World = Alone()


def led(world: World, work: Callable[[], T]) -> T:
    """Lets rank 0 do what each rank would do alike, and returns what it found, as JSON holds it, on all.

    Raises:
        UserError: what rank 0 raised; on the others `SaidElsewhere`.
    """
    if world.size == 1:
        return work()
    if not world.leads:
        facts = world.broadcast(None).facts
        if "error" in facts:
            raise SaidElsewhere(facts["error"])
        found: T = facts["found"]
        return found
    try:
        found = work()
    except UserError as error:
        world.broadcast(Message({"error": str(error)}))
        raise
    world.broadcast(Message({"found": found}))
    return found


def agree(world: World, facts: Mapping[str, object]) -> None:
    """Raises `UserError` on all ranks where one of them has other facts than rank 0, naming the first that differs."""
    plain = json.loads(json.dumps(facts, default=str))
    first: dict[str, object] = {}
    differs: tuple[int, str] | None = None
    for rank, message in enumerate(world.gather(Message(plain))):
        first = first or message.facts
        differing = [key for key in first if first[key] != message.facts.get(key)]
        if differing and differs is None:
            differs = rank, differing[0]
    if differs is not None:
        raise UserError(
            f"ranks: rank {differs[0]} has another {differs[1]} than rank 0: start all of them with one command, "
            "one version of the code and the same libraries"
        )
