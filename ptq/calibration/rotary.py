"""Which channels an attention's rotary embeddings turn together, told by what they do and not by the architecture."""

from collections.abc import Mapping, Sequence

import torch

from ptq.errors import UserError
from ptq.network.attention import CHILD, AttentionQuantizers, attention_kept, show_tables, use_simulated_attention
from ptq.network.block_stream import BlockStream, Flow, Nothing
from ptq.network.network import Block, Network
from quantize.transforms.rotary import layout_of

TOKENS = 8
"""Positions that are looked at."""
WORDS = ("scheme.cache.before_rope: true", "use false")
"""What asks for the layouts, where a cache does, and what to do where there are none."""


@torch.no_grad()
def rotary_layouts(
    network: Network,
    stream: BlockStream,
    attentions: Mapping[int, Sequence[str]],
    words: tuple[str, str] = WORDS,
) -> dict[str, str]:
    """Returns the layout of the rotary embeddings of every attention, by full name.

    A block is given the same hidden state at every position: what its attention's keys differ by then is the embeddings.

    Args:
        network: the model.
        stream: calls its blocks.
        attentions: full names of the attentions of each block.
        words: what asks for them, and what to do where there are none, for messages.

    Raises:
        UserError: for an attention that is called without rotary embeddings, or with some that no known layout undoes.
    """
    with attention_kept(network):
        use_simulated_attention(network)
        finder = RotaryFinder(network, stream, attentions, words)
        stream.run([finder.flow], finder, "rotary embeddings")
    return finder.found


class RotaryFinder(Nothing):
    """The visitor that looks at a block before its `flow` passes through it, while the model calls simulated attentions. Arguments:
    `rotary_layouts`.
    """

    def __init__(
        self,
        network: Network,
        stream: BlockStream,
        attentions: Mapping[int, Sequence[str]],
        words: tuple[str, str] = WORDS,
    ):
        self._words = words
        self._network, self._stream, self._attentions = network, stream, attentions
        ids = torch.arange(1, TOKENS + 1)[None] % network.model.get_input_embeddings().num_embeddings
        self.flow: Flow = stream.open(ids, 1)
        self.found: dict[str, str] = {}

    def enter(self, block: Block) -> None:
        """Finds the layouts of the block's attentions. Raises `UserError` as `rotary_layouts`."""
        seen: dict[str, tuple[torch.Tensor, AttentionQuantizers]] = {}
        names = self._attentions.get(block.index, ())
        for name in names:
            self._watch(name, seen)
        hidden = self.flow.hidden[:, 1:2].expand_as(self.flow.hidden).contiguous()
        try:
            self._stream.call(self.flow, block, 0, hidden.to(self._stream.device))
        finally:
            for name in names:
                delattr(self._network.model.get_submodule(name), CHILD)
        for name, (keys, watcher) in seen.items():
            layout = None if watcher.tables is None else layout_of(keys, *watcher.tables)
            if layout is None:
                field, instead = self._words
                raise UserError(f"{field}, but {name} has no rotary embeddings that can be undone: {instead}")
            self.found[name] = layout

    def _watch(self, name: str, seen: dict[str, tuple[torch.Tensor, AttentionQuantizers]]) -> None:
        module, watcher = self._network.model.get_submodule(name), AttentionQuantizers({})

        def watch(tensor: str, x: torch.Tensor) -> None:
            if tensor == "key":
                seen[name] = (x.unflatten(2, (-1, self._network.head_dim)).transpose(1, 2), watcher)

        watcher.watch = watch
        setattr(module, CHILD, watcher)
        show_tables(module)
