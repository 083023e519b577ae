"""What an attention multiplies, quantized: query, key, value after rotary embeddings, and the probabilities.

It enters through transformers' own extension point, the attention interface: a model that calls it is covered, whatever
its architecture. A model with an attention of its own (BLOOM, Falcon) is not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ptq.errors import UserError
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import Block, Network
from quantize.modules.simulated import InputQuantizer

NAME = "ptq_simulated"
CHILD = "attention_quantizers"
TENSORS = ("query", "key", "value")


class AttentionQuantizers(nn.Module):
    """Quantizers by tensor (``query``, ``key``, ``value``, ``attention_probs``), a child of the attention that they serve.

    `transforms` act on query and key, (batch, heads, tokens, head_dim), before they are quantized. While `watch` is set, it
    is called with (tensor, values (batch, tokens, heads * head_dim)) and nothing is quantized.
    """

    def __init__(self, quantizers: dict[str, InputQuantizer], transforms: dict[str, nn.Module] | None = None):
        super().__init__()
        self.quantizers = nn.ModuleDict(quantizers)
        self.transforms = nn.ModuleDict(transforms or {})
        self.watch: Callable[[str, torch.Tensor], None] | None = None

    def quantize(self, tensor: str, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` (batch, heads, tokens, head_dim) rounded: dynamic ranges are those of a token in a head (or of a
        group in it), static ones those of channels over all heads.
        """
        if tensor in self.transforms:
            x = self.transforms[tensor](x)
        if self.watch is not None:
            self.watch(tensor, x.transpose(1, 2).flatten(2))
            return x
        if tensor not in self.quantizers:
            return x
        quantizer = self.quantizers[tensor]
        spec = quantizer.spec
        if spec.dynamic or spec.granularity == "tensor":  # type: ignore[union-attr]
            done: torch.Tensor = quantizer(x)
            return done
        flat: torch.Tensor = quantizer(x.transpose(1, 2).flatten(2))
        return flat.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


def simulated_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of transformers' interface with the quantizers of `module`, if it has any.

    Query (batch, heads, tokens, head_dim), key and value (batch, kv heads, tokens, head_dim); returns
    (batch, tokens, heads, head_dim) and, where they had to be formed, the probabilities.
    """
    if s_aux is not None:
        raise UserError(
            "scheme: an attention with sinks cannot be simulated: leave query, key, value and attention_probs null"
        )
    quantizers = getattr(module, CHILD, None)
    if quantizers is not None:
        query, key, value = (quantizers.quantize(name, x) for name, x in zip(TENSORS, (query, key, value), strict=True))
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if softcap is None and (quantizers is None or "attention_probs" not in quantizers.quantizers):
        y = functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return y.transpose(1, 2).contiguous(), None
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if quantizers is not None and "attention_probs" in quantizers.quantizers:
        probabilities = quantizers.quantizers["attention_probs"](probabilities)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(NAME, simulated_attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def unquantized_attention(block: Block) -> Iterator[None]:
    """Inside the context the block's attentions multiply what is not quantized; their transforms still act."""
    quantized = [(m, m.quantizers) for m in block.module.modules() if isinstance(m, AttentionQuantizers)]
    for module, _ in quantized:
        module.quantizers = nn.ModuleDict()
    try:
        yield
    finally:
        for module, quantizers in quantized:
            module.quantizers = quantizers


def use_simulated_attention(network: Network) -> None:
    """Lets the model call `simulated_attention` from now on."""
    network.model.set_attn_implementation(NAME)


def attentions_of(network: Network, stream: BlockStream) -> dict[int, list[str]]:
    """Returns the full names of the modules that call the attention interface, by block, seen in one tiny forward pass."""
    found: dict[int, list[str]] = {block.index: [] for block in network.blocks}
    before = network.model.config._attn_implementation
    network.model.set_attn_implementation(NAME)
    seers = []
    try:
        for block in network.blocks:
            for name, module in block.module.named_modules(prefix=block.name):
                if not hasattr(module, CHILD):
                    # Beside the children and not among them: what goes through a list of children is not to meet it.
                    module.__dict__[CHILD] = _Seer(name, found[block.index])
                    seers.append(module)
        ids = torch.arange(1, 5)[None] % network.model.get_input_embeddings().num_embeddings
        stream.run([stream.open(ids, 1)], Nothing(), "attention")
    finally:
        for module in seers:
            del module.__dict__[CHILD]
        network.model.set_attn_implementation(before)
    return found


@dataclass(frozen=True)
class _Seer:
    """Stands in for an attention's quantizers, and notes that the attention `name` asks for them."""

    name: str
    found: list[str]
    quantizers: Mapping[str, InputQuantizer] = field(default_factory=dict)

    def quantize(self, tensor: str, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` as it is."""
        if self.name not in self.found:
            self.found.append(self.name)
        return x
