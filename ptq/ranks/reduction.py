"""What ranks do together: sums of what each has seen, and pieces of work that each does some of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from ptq.errors import UserError
from ptq.ranks.sample_sum import SampleSum, shares
from ptq.ranks.world import Message, World


class Summed(Protocol):
    """An accumulator that can be merged with another, and sent."""

    def merge(self, other: Any) -> None:
        """Adds what the other has seen, in place."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what has been accumulated, by name."""


S = TypeVar("S", bound=Summed)


def merged(one: S, other: S) -> S:
    """Returns the first, to which the second has been added."""
    one.merge(other)
    return one


def total_of(
    world: World,
    mine: SampleSum[S],
    from_state: Callable[[Mapping[str, torch.Tensor]], S],
    device: torch.device | str,
    to: int | None = None,
) -> S | None:
    """Returns the sum over the samples of all ranks, in the order of the samples; None where there is none.

    Args:
        world: the ranks.
        mine: what this one has summed; of no use afterwards.
        from_state: makes an accumulator of what another's ``state`` gave.
        device: where its tensors are to be.
        to: the rank that gets it, the others get None; None for all of them.
    """
    if world.size == 1:
        return mine.total()
    nodes = mine.nodes()
    places = [[level, index] for level, index, _ in nodes]
    tensors = {f"{i}|{key}": t for i, (_, _, value) in enumerate(nodes) for key, t in value.state().items()}
    whole = mine.like()
    for message in world.gather(Message(places, tensors), to):
        for i, (level, index) in enumerate(message.facts):
            prefix = f"{i}|"
            # A copy: what this rank has merged is added to in place.
            state = {k.removeprefix(prefix): t.to(device) for k, t in message.tensors.items() if k.startswith(prefix)}
            whole.add([(level, index, from_state(state))])
    return whole.total()


def in_shares(world: World, count: int, work: Callable[[slice], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Shares out `count` things, and returns what `work` gives of them all, on every rank.

    Args:
        world: the ranks.
        count: how many things there are, 1 or more.
        work: gives tensors on the CPU, each of some rows a thing, of those of a slice.
    """
    if world.size == 1:
        return work(slice(0, count))
    share = shares(count, 1, world.size)[world.rank]
    own = work(slice(share.start, share.stop)) if len(share) else ()
    parts = [m.tensors for m in world.gather(Message(tensors={str(i): t for i, t in enumerate(own)})) if m.tensors]
    return tuple(torch.cat([part[str(i)].cpu() for part in parts]) for i in range(len(parts[0])))


def by_cost(costs: Sequence[float], ranks: int) -> list[int]:
    """Returns the rank that does each piece of work: the most costly first, each to the rank that has the least to do."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[piece] = min(range(ranks), key=load.__getitem__)
        load[owners[piece]] += costs[piece]
    return owners


def in_order(costs: Sequence[float], ranks: int) -> list[int]:
    """Returns the rank that does each piece of work, where neighbours are done best by one rank: each has an equal stretch of the costs."""
    total, before, owners = sum(costs), 0.0, []
    for cost in costs:
        middle = (before + cost / 2) / total if total else 0.0
        owners.append(min(int(middle * ranks), ranks - 1))
        before += cost
    return owners


def done_by(world: World, owners: Sequence[int], work: Callable[[int], Message]) -> list[Message]:
    """Does the pieces of work of which this rank is the owner, and returns what came of all of them, in order.

    Args:
        world: the ranks.
        owners: which rank does each piece.
        work: does the piece of that number.

    Raises:
        UserError: on all ranks, the first that a piece of work raised.
    """
    mine: dict[int, Message] = {}
    for piece, owner in enumerate(owners):
        if owner == world.rank:
            try:
                found = work(piece)
                mine[piece] = Message({"found": found.facts}, found.tensors)
            except UserError as error:
                mine[piece] = Message({"error": str(error)})
                break
    told = []
    for piece, owner in enumerate(owners):
        given = mine.pop(piece, Message({"error": ""})) if owner == world.rank else None
        message = world.broadcast(given, owner)
        if "error" in message.facts:
            raise UserError(message.facts["error"])
        told.append(Message(message.facts["found"], message.tensors))
    return told
