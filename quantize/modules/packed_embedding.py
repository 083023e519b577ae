"""A token embedding held as packed codes: the rows that are looked up are decoded, and no others."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from quantize.codecs.base import Encoded
from quantize.codecs.registry import codec_of
from quantize.modules.packed import DecodedWeight, keeping_types, packed_layout
from quantize.spec.quant_spec import QuantSpec


class PackedEmbedding(nn.Embedding):
    """An embedding whose weight (vocabulary, channels) is held as packed codes and scales, with no dequantized copy beside them.

    What it stores are parameters that need no gradient, named as `Codec.encode` names them. ``weight`` is decoded as a whole each
    time that it is read (a `DecodedWeight`); a forward decodes the rows of its tokens. Made by `packed_embedding`.

    Attributes:
        unit: a parameter with one element, 1, in the type of what is looked up: the embedding comes first, and transformers takes
            the type of a model's first floating-point parameter for that of the model, which scales need not have.
    """

    weight_spec: QuantSpec
    stored_names: tuple[str, ...]
    unit: nn.Parameter

    @property
    def dtype(self) -> torch.dtype:
        """Of what is looked up, the model's."""
        return self.unit.dtype

    @property
    def stored(self) -> Encoded:
        """The tensors that hold the weight."""
        return {name: getattr(self, name) for name in self.stored_names}

    @torch.no_grad()
    def encode(self, weight: torch.Tensor) -> Encoded:
        """Returns what `store` would hold of a floating-point weight (vocabulary, channels).

        Raises:
            ValueError: for another shape, or a weight that `quantize.codecs.base.checked` refuses.
        """
        if weight.shape != (self.num_embeddings, self.embedding_dim):
            raise ValueError(f"shape {tuple(weight.shape)} is not {(self.num_embeddings, self.embedding_dim)}")
        return codec_of(self.weight_spec).encode(weight.contiguous(), self.weight_spec)

    def store(self, weight: torch.Tensor) -> None:
        """Encodes a floating-point weight and holds the result. Raises `ValueError` as `encode`."""
        for name, tensor in self.encode(weight).items():
            setattr(self, name, nn.Parameter(tensor.detach(), requires_grad=False))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the weight (vocabulary, channels) that the codes stand for."""
        shape = (self.num_embeddings, self.embedding_dim)
        return codec_of(self.weight_spec).decode(self.stored, self.weight_spec, shape, dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name not in self._parameters:
            return self.dequantized(self.dtype).as_subclass(DecodedWeight)
        return super().__getattr__(name)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the rows (..., channels) of the tokens `input`, int64 (...)."""
        codec, shape = codec_of(self.weight_spec), (self.num_embeddings, self.embedding_dim)
        if not input.numel():
            return torch.empty(*input.shape, shape[1], dtype=self.dtype, device=input.device)
        index = input.reshape(-1)
        rows = codec.rows(self.stored, self.weight_spec, shape, index)
        decoded = codec.decode(rows, self.weight_spec, (len(index), shape[1]), self.dtype)
        return decoded.view(*input.shape, shape[1])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        result: Self = super()._apply(keeping_types(self.stored, fn), recurse)
        return result

    def extra_repr(self) -> str:
        """Names the shape and the format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.weight_spec}"


def packed_embedding(module: nn.Embedding, spec: QuantSpec) -> PackedEmbedding:
    """Returns an embedding like `module` whose weight is to be held in a format: empty, on its device; `module` stays as it is.

    What a class derived from `nn.Embedding` does beside the lookup, such as scaling what it gives, is done by the new one too, as long
    as it has the lookup done by ``super().forward``.

    Args:
        module: an embedding.
        spec: the format.

    Raises:
        ValueError: for a format that the weight cannot have, or whose rows are not stored by themselves.
    """
    weight = module.weight
    if module.max_norm is not None:
        raise ValueError("max_norm: rows that are scaled at each lookup cannot be held in another format")
    shape = (module.num_embeddings, module.embedding_dim)
    layout = packed_layout(*shape, spec)
    one = torch.zeros(1, dtype=torch.int64)
    codec_of(spec).rows(
        {name: torch.empty(size, dtype=kind) for name, (size, kind) in layout.items()}, spec, shape, one
    )
    plain = type(module) is nn.Embedding
    kind = PackedEmbedding if plain else type(f"Packed{type(module).__name__}", (type(module), PackedEmbedding), {})
    made: Any = copy.copy(module)
    made.__class__ = kind
    made._parameters = {name: p for name, p in module._parameters.items() if name != "weight"}
    made._buffers, made._non_persistent_buffers_set = dict(module._buffers), set(module._non_persistent_buffers_set)
    made.weight_spec, made.stored_names = spec, tuple(layout)
    made.register_parameter(
        "unit", nn.Parameter(torch.ones(1, dtype=weight.dtype, device=weight.device), requires_grad=False)
    )
    for name, (size, stored) in layout.items():
        empty = torch.empty(size, dtype=stored, device=weight.device)
        made.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    found: PackedEmbedding = made
    return found


def plain_embedding(module: PackedEmbedding, weight: nn.Parameter) -> nn.Embedding:
    """Returns the embedding that `module` was made from, with this weight (vocabulary, channels)."""
    made: Any = copy.copy(module)
    made.__class__ = nn.Embedding if type(module) is PackedEmbedding else type(module).__bases__[0]
    made._parameters = {name: p for name, p in module._parameters.items() if name not in (*module.stored_names, "unit")}
    made._parameters["weight"] = weight
    for name in ("weight_spec", "stored_names"):
        del made.__dict__[name]
    found: nn.Embedding = made
    return found
