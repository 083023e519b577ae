"""Which experts see which tokens: a mixture's choice, changed or counted on its way to the experts."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptq.network.experts.trace import Mixture

Choice = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""Gets the name of a mixture's holder inside its block, its number of experts, the numbers of those that were chosen, int64
(tokens, k), their weights (tokens, k) and scores (tokens, experts) or None; returns numbers and weights (tokens, n)."""

_NOW: ContextVar[Choice | None] = ContextVar("ptq-routing", default=None)
ROUTED, ALL, LEAST = "routed", "all", "at-least-"


@contextmanager
def routed_by(choice: Choice | None) -> Iterator[None]:
    """Inside the context the experts of all mixtures get the tokens that the choice gives them.

    It holds for this thread and this greenlet: batches that wait in a block keep theirs.
    """
    token = _NOW.set(choice)
    try:
        yield
    finally:
        _NOW.reset(token)


def attach_routing(block: nn.Module, mixture: Mixture) -> None:
    """Lets `routed_by` reach a mixture of a block, once and for good; without a choice nothing changes."""
    routing, place, experts = mixture.routing, mixture.holders[0], mixture.experts
    if routing is None:
        return
    module = block.get_submodule(routing.module)
    if module.__dict__.get("ptq_routed"):
        return
    module.__dict__["ptq_routed"] = True
    scores: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any, item: int = routing.scores[1] if routing.scores else 0) -> None:
        if _NOW.get() is not None:
            scores[:] = [output[item] if isinstance(output, tuple) else output]

    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choice = _NOW.get()
        if choice is None:
            return None
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update((key, value) for key, value in kwargs.items())
        seen = scores.pop().reshape(-1, experts) if scores else None
        found = choice(place, experts, given[routing.index], given[routing.weights], seen)
        given[routing.index], given[routing.weights] = found
        return tuple(given[i] for i in range(len(args))), {key: given[key] for key in kwargs}

    if routing.scores is not None:
        block.get_submodule(routing.scores[0]).register_forward_hook(keep)
    module.register_forward_pre_hook(change, with_kwargs=True)


def evenly(
    place: str, experts: int, index: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice that sends every token to every expert, all with one weight: for looking at what experts do."""
    numbers = torch.arange(experts, device=index.device, dtype=index.dtype).expand(len(index), experts)
    return numbers, torch.full_like(weights[:, :1], 1 / experts).expand(len(index), experts)


@dataclass
class ExpertTokens:
    """What calibration samples show to experts, and what they have shown.

    Attributes:
        mode: ``routed`` (what the router chooses), ``all`` (every token), or ``at-least-N``.
        samples: how many samples there are.
        length: tokens of a sample.
        routed: by full name of a mixture's holder, how many tokens the router sent to each expert, int64 (experts,).
        seen: how many each expert has seen.
        own: numbers of the batches that this rank counts, where ranks share them; None for all.
    """

    mode: str
    samples: int
    length: int
    routed: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    own: range | None = None
    _fresh: dict[str, torch.Tensor] = field(default_factory=dict)
    _counted: set[tuple[str, int]] = field(default_factory=set)

    @property
    def quota(self) -> int:
        """Tokens of each sample that every expert sees at least; N over the samples, rounded up."""
        return math.ceil(int(self.mode.removeprefix(LEAST)) / self.samples) if self.mode.startswith(LEAST) else 0

    def choice(self, block: str, batch: int) -> Choice:
        """Returns the choice for one batch at the block of that full name; a batch is counted once."""

        def choose(
            place: str, experts: int, index: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            more, added = self._with_others(experts, index, weights, scores)
            holder = f"{block}.{place}"
            if (holder, batch) not in self._counted:
                self._counted.add((holder, batch))
                found = torch.stack([torch.bincount(n.flatten(), minlength=experts) for n in (index, more)])
                if self.own is None:
                    self.add({holder: found})
                elif batch in self.own:
                    self._fresh[holder] = self._fresh[holder] + found if holder in self._fresh else found
            return more, added

        return choose

    def take_fresh(self) -> dict[str, torch.Tensor]:
        """Returns what this rank has counted of its own batches and not added yet: routed and seen, int64 (2, experts)."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    def add(self, counts: Mapping[str, torch.Tensor]) -> None:
        """Adds counts, as `take_fresh` returns them, of any rank."""
        for holder, (routed, seen) in counts.items():
            for known, found in ((self.routed, routed), (self.seen, seen)):
                known[holder] = known[holder] + found.to(known[holder].device) if holder in known else found

    def of(self, expert: str) -> tuple[int, int] | None:
        """Returns how many tokens the router has sent to the expert of that full name, and how many it has seen."""
        holder, _, number = expert.rpartition(".")
        if holder not in self.seen:
            return None
        return int(self.routed[holder][int(number)]), int(self.seen[holder][int(number)])

    def _with_others(
        self, experts: int, index: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mode == ROUTED:
            return index, weights
        if scores is None:
            scores = torch.zeros(len(index), experts, device=index.device)
        own = torch.zeros(len(index), experts, dtype=torch.bool, device=index.device).scatter_(1, index, True)
        if self.mode == ALL:
            return with_others(index, weights, ~own, scores)
        # The highest scores of each sample for each expert, those that were chosen first.
        ranked = scores.float().masked_fill(own, torch.inf).view(-1, self.length, experts)
        nearest = ranked.topk(min(self.quota, self.length), dim=1).indices
        wanted = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, nearest, True).view(-1, experts)
        return with_others(index, weights, wanted, scores)


def with_others(
    index: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the choice with more experts, which see the tokens and give nothing to the output.

    Args:
        index: experts that were chosen, int64 (tokens, k).
        weights: theirs (tokens, k).
        wanted: bool (tokens, experts); true for those that shall see the token beside the chosen ones.
        scores: the router's (tokens, experts).

    Returns:
        Numbers and weights (tokens, n): the chosen ones first, as they were, then the others with weight 0. All tokens have
        as many; where fewer are wanted, those with the next scores fill up.
    """
    own = torch.zeros_like(wanted).scatter_(1, index, True)
    more = wanted & ~own
    most = int(more.sum(1).max()) if more.numel() else 0
    if not most:
        return index, weights
    places = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    rank = (~more).to(places.dtype) * (scores.shape[1] + 1) + places + own.to(places.dtype) * 4 * scores.shape[1]
    others = rank.argsort(1)[:, :most].to(index.dtype)
    return torch.cat([index, others], 1), torch.cat([weights, torch.zeros_like(others, dtype=weights.dtype)], 1)
