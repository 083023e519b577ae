"""PrefixQuant (Chen et al. 2024): a few tokens before all others draw the massive activations, so that static ranges hold.

A language model gives some tokens, the first one and delimiters above all, states many times as large as all others, and lets
attention rest on them (Sun et al. 2024). Which these are is found in calibration; their keys and values, computed once in the model's own
type, stand before those of every sequence, which then grows no such states of its own.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch

from ptq.calibration.rotary import rotary_layouts
from ptq.config.options import option
from ptq.errors import UserError
from ptq.network.attention import CHILD, PREFIX, AttentionQuantizers, Prefix
from ptq.network.block_stream import Flow
from ptq.network.network import Block
from ptq.steps._step import KEY, Context, StepPlan, Transform


@dataclass(frozen=True)
class Options:
    """Which tokens.

    Attributes:
        tokens: ids of the tokens, in order; empty finds them: as many as stand out in a sample, the most frequent ones, and
            the model's BOS last.
        most: how many are taken at most, where they are found.
        threshold: how many times the median token's norm the state of one that stands out has.
        samples: calibration samples that are looked at.
    """

    tokens: tuple[int, ...] = ()
    most: int = option(4, least=1)
    threshold: float = option(8.0, least=1)
    samples: int = option(8, least=1)


class Step(Transform):
    """Puts the prefix before every attention's keys and values, once all transforms have acted."""

    acts: ClassVar[frozenset[str]] = frozenset({KEY})
    proved: ClassVar[bool] = False

    def plan(self, context: Context) -> StepPlan:
        """Finds the tokens and carries them through the network alone: what comes later cannot reach them."""
        if not any(context.attentions.values()):
            raise UserError(
                "steps.prefix: this model's attention does not use transformers' attention interface, so nothing can stand "
                "before its keys: remove it with ~steps.prefix"
            )
        vocabulary = context.network.model.get_input_embeddings().num_embeddings
        if wrong := [token for token in self.options.tokens if not 0 <= token < vocabulary]:
            raise UserError(f"steps.prefix.tokens: {wrong[0]} is no token of {vocabulary}: use 0 to {vocabulary - 1}")
        rotary_layouts(
            context.network, context.stream, context.attentions, ("steps.prefix", "remove it with ~steps.prefix")
        )
        flow = context.drawn("steps.prefix", self.options.samples)
        before = _Norms(flow, self.options.threshold)
        context.show(before, flow, "prefix: states that stand out")
        tokens = list(self.options.tokens) or self._found(before, context)
        ids = torch.tensor([tokens])
        flow = _flow(context, ids)
        states = _States(flow)
        context.show(states, flow, "prefix")
        plan = StepPlan({"ids": ids, **states.hidden}, {"tokens": tokens}, stale=True)
        flow = context.drawn("steps.prefix", context.batch_size)
        after = _Norms(flow, self.options.threshold, lambda block: self.finish(block, plan, context))
        try:
            context.show(after, flow, "prefix: states that stand out with it")
        finally:
            for names in context.attentions.values():
                for name in names:
                    context.module(name)._modules.pop(PREFIX, None)
        context.note(
            f"prefix: tokens {tokens}; a sample has {before.each:.2f} tokens that stand out, {after.each:.2f} with the prefix"
        )
        return plan

    def _found(self, norms: "_Norms", context: Context) -> list[int]:
        """Returns the tokens that stand out most often, as many as a sample has of them, BOS last where there is one."""
        count = max(1, min(self.options.most, math.ceil(norms.each)))
        bos = getattr(context.network.model.config.get_text_config(), "bos_token_id", None)
        last = [int(bos)] if isinstance(bos, int) else []
        often = [token for token, _ in norms.tokens.most_common() if token not in last]
        found = often[: count - len(last)] + last
        if not found:
            raise UserError(
                "steps.prefix.tokens: no token stands out in the calibration samples, and the model names no BOS: give tokens, "
                "or remove it with ~steps.prefix"
            )
        return found

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Does nothing yet: transforms after this one may change what keys and values are."""

    @torch.no_grad()
    def finish(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Computes the prefix's keys and values in the block as it is now, and puts them before its attentions'."""
        names = context.attentions.get(block.index, [])
        for name in names:
            context.module(name)._modules.pop(PREFIX, None)
        flow, hidden = _flow(context, plan.tensors["ids"]), plan.tensors[f"block.{block.index}"]
        own = next((name for name, step in context.steps.items() if step is self), None)
        later = list(context.plans.values())[list(context.plans).index(own) + 1 :] if own in context.plans else []
        for other in later:
            hidden = hidden if other.basis is None else other.basis.forward(hidden)
        found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
        standing = {name: context.module(name)._modules.get(CHILD) for name in names}
        for name, there in standing.items():
            _watch(context, name, there, found[name])
        try:
            context.stream.call(flow, block, 0, hidden.to(context.stream.device))
        finally:
            for name, there in standing.items():
                context.module(name)._modules.pop(CHILD, None)
                if isinstance(there, AttentionQuantizers):
                    there.watch = None
                    context.module(name).add_module(CHILD, there)
        for name, states in found.items():
            context.module(name).add_module(PREFIX, Prefix(states["key"], states["value"]))


def _flow(context: Context, ids: torch.Tensor) -> Flow:
    """Returns the prefix as it enters the first block, at the positions right before 0."""
    return context.stream.open(ids.cpu(), 1, positions=torch.arange(-ids.shape[1], 0)[None])


def _watch(context: Context, name: str, there: object, found: dict[str, torch.Tensor]) -> None:
    """Lets `found` have keys and values (1, kv heads, tokens, head_dim) of the attention `name`, transforms done."""
    head_dim = context.network.head_dim
    watcher = there if isinstance(there, AttentionQuantizers) else AttentionQuantizers({})

    def watch(tensor: str, x: torch.Tensor) -> None:
        found[tensor] = x.unflatten(2, (-1, head_dim)).transpose(1, 2).contiguous()

    watcher.watch = watch
    context.module(name)._modules[CHILD] = watcher


class _Norms:
    """Counts the tokens whose state after some block stands out; `finish` is called with each block before they pass."""

    def __init__(self, flow: Flow, threshold: float, finish: object = None):
        self._flow, self._threshold, self._finish = flow, threshold, finish
        self._out: torch.Tensor = torch.zeros(flow.ids.shape, dtype=torch.bool)

    def enter(self, block: Block) -> None:
        """Changes the block, where asked to."""
        if callable(self._finish):
            self._finish(block)

    def leave(self, block: Block) -> None:
        """Looks at what has come out of the block."""
        norms = self._flow.hidden.float().norm(dim=-1)
        self._out |= (norms > self._threshold * norms.median()).cpu()

    @property
    def each(self) -> float:
        """How many tokens of a sample stand out."""
        return float(self._out.sum()) / len(self._out)

    @property
    def tokens(self) -> Counter[int]:
        """How often each token stands out elsewhere than at the beginning, where any does."""
        return Counter(self._flow.ids[:, 1:][self._out[:, 1:]].tolist())


class _States:
    """Keeps the hidden states of the prefix before each block."""

    def __init__(self, flow: Flow):
        self._flow = flow
        self.hidden: dict[str, torch.Tensor] = {}

    def enter(self, block: Block) -> None:
        """Keeps them."""
        self.hidden[f"block.{block.index}"] = self._flow.hidden.clone()

    def leave(self, block: Block) -> None:
        """Does nothing."""
