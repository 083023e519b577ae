"""Which experts see which tokens: the choice of a mixture's router, changed on its way to the experts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ptq.network.experts.trace import Routing

Choice = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""Gets numbers of experts, int64 (tokens, k), their weights (tokens, k) and scores (tokens, experts) or None; returns other
numbers and weights (tokens, n)."""


@contextmanager
def rerouted(block: nn.Module, routings: list[tuple[Routing, int]], choose: Callable[[int], Choice]) -> Iterator[None]:
    """Inside the context the experts of a block get the tokens that a choice gives them.

    Args:
        block: the block.
        routings: how each of its mixtures hands out tokens, and its number of experts.
        choose: gives the choice for a number of experts.
    """
    with ExitStack() as stack:
        for routing, experts in routings:
            scores: list[torch.Tensor] = []
            if routing.scores is not None:
                source, item = routing.scores
                hook = _keeping(scores, item)
                stack.callback(block.get_submodule(source).register_forward_hook(hook).remove)
            module, choice = block.get_submodule(routing.module), choose(experts)
            handle = module.register_forward_pre_hook(_changing(routing, choice, scores, experts), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _keeping(scores: list[torch.Tensor], item: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        scores[:] = [output[item] if isinstance(output, tuple) else output]

    return hook


def _changing(routing: Routing, choice: Choice, scores: list[torch.Tensor], experts: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update((key, value) for key, value in kwargs.items())
        seen = scores[0].reshape(-1, experts) if scores else None
        index, weights = choice(given[routing.index], given[routing.weights], seen)
        given[routing.index], given[routing.weights] = index, weights
        return tuple(given[i] for i in range(len(args))), {key: given[key] for key in kwargs}

    return hook


def evenly(experts: int) -> Choice:
    """The choice that sends every token to every expert, all with one weight: for looking at what experts do."""

    def choose(
        index: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(experts, device=index.device).expand(len(index), experts)
        return numbers.to(index.dtype), torch.full_like(weights[:, :1], 1 / experts).expand(len(index), experts)

    return choose


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
