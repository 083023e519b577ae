"""What rounding the weights of embedding and head costs, where the scheme gives them a format."""

from collections.abc import Callable, Mapping

import torch

from ptq.config.schema import SchemeConfig
from ptq.network.network import Network
from ptq.network.outside import OutsideWeight, outside_weights
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec


class OutsideFisher:
    """Gathers squared gradients by the weights of embedding and head: their Fisher information's diagonal.

    Vocabularies are large: single entries are taken as independent, and one tensor of a weight's size is held for all formats.
    What both uses of a tied weight cost is added.

    Args:
        scheme: says which of the two are quantized.
        network: the model.
        device: where the arithmetic happens.
    """

    def __init__(self, scheme: SchemeConfig, network: Network, device: torch.device):
        found = [weight for weight in outside_weights(scheme, network) if weight.spec is not None]
        first = {weight.tensor: weight for weight in found}
        self._network = network
        self._of = {w.tensor: (first["embedding"].name if w.tied else w.name) for w in found}
        self._squares = {w.name: torch.zeros(w.shape, device=device) for w in found if not w.tied}
        self._weights: list[OutsideWeight] = [w for w in found if not w.tied]

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """By full name of a module, which of ``embedding`` and ``head`` its weight is."""
        return {w.name: tuple(t for t, name in self._of.items() if name == w.name) for w in self._weights}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(vocabulary, channels) of the weights by full name of a module."""
        return {weight.name: weight.shape for weight in self._weights}

    @property
    def head(self) -> Callable[[torch.Tensor], None] | None:
        """What is given each sample's gradient by the head's weight; None where the head is left alone."""
        return self._adds("head")

    @property
    def embedding(self) -> Callable[[torch.Tensor], None] | None:
        """What is given each batch's gradient by the embedding's weight; None where the embedding is left alone."""
        return self._adds("embedding")

    def _adds(self, tensor: str) -> Callable[[torch.Tensor], None] | None:
        if tensor not in self._of:
            return None
        squares = self._squares[self._of[tensor]]

        def seen(gradient: torch.Tensor) -> None:
            squares.addcmul_(gradient, gradient)

        return seen

    def costs(self, formats: Mapping[str, QuantSpec], positions: int) -> dict[str, dict[str, float]]:
        """Returns by full name and format the predicted KL, nats a token; the weights are in memory, as the transforms leave them."""
        found: dict[str, dict[str, float]] = {}
        for name, squares in self._squares.items():
            weight = self._network.model.get_submodule(name).weight.float()
            found[name] = {}
            for form, spec in formats.items():
                error = codec_of(spec).fake_weight(weight, spec).sub_(weight)
                found[name][form] = float(error.square_().mul_(squares).sum(dtype=torch.float64)) / (2 * positions)
        return found
