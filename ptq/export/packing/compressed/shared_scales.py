"""NVFP4's scale of the tensor, one for the Linears that vLLM multiplies as one: q, k and v, gate and up."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ptq.config.scheme import LinearSpecs
from ptq.export.quantized_tensors import LinearTensors, QuantizedTensors
from ptq.network.network import Network
from quantize.codecs.base import Encoded
from quantize.codecs.nvfp4 import with_tensor_scale

SHAREABLE = "power_of_two"
"""`QuantSpec.scales` of weights whose values stay what they are under another weight's scale."""


def side_by_side(network: Network, specs: Mapping[str, LinearSpecs], format: str) -> dict[str, tuple[str, ...]]:
    """Returns, by each of their names, the Linears with weights of `format` that stand in one module and have inputs of one width,
    where there are several.

    What a runtime multiplies as one is among them, whatever the architecture; o beside q, k and v is too where it is as wide.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for name, spec in specs.items():
        # The head stands alone.
        if name in network.shapes and spec.weight is not None and spec.weight.format == format:
            found.setdefault((name.rpartition(".")[0], network.shapes[name][1]), []).append(name)
    return {name: tuple(names) for names in found.values() if len(names) > 1 for name in names}


@dataclass
class SharedScales:
    """What NVFP4 weights are stored as when Linears that are multiplied as one have one scale of the tensor.

    Attributes:
        source: the model.
        specs: of its Linears.
        changed: blocks of weights so far that another scale of the tensor has changed (`with_tensor_scale`).
    """

    source: QuantizedTensors
    specs: Mapping[str, LinearSpecs]
    changed: int = 0
    _scales: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._together = side_by_side(self.source.network, self.specs, "nvfp4")

    def stored(self, tensors: LinearTensors) -> Encoded:
        """Returns what is stored of a Linear's weight, whose format is no integer grid.

        Raises:
            ValueError: for a weight that has a grid.
        """
        if tensors.stored is None or tensors.spec is None:
            raise ValueError(f"{tensors.name}: its format has codes on a grid")
        names = self._together.get(tensors.name)
        if names is None or tensors.spec.scales != SHAREABLE:
            return tensors.stored
        if names not in self._scales:
            each = (tensors if name == tensors.name else self.source.linear(name) for name in names)
            self._scales[names] = torch.stack([t.stored["tensor_scale"] for t in each if t.stored is not None]).amax(0)
        stored, changed = with_tensor_scale(tensors.stored, self._scales[names])
        self.changed += changed
        return stored

    def notes(self) -> tuple[str, ...]:
        """Returns what is to be said of the weights whose tensors were asked for."""
        alone = next((name for name in self._together if _scales(self.specs[name]) != SHAREABLE), None)
        if alone is not None:
            names = ", ".join(name.rpartition(".")[2] for name in self._together[alone])
            return (
                f"vLLM keeps one scale of the tensor for those that it multiplies as one of {names}, and this run's have one each: it "
                "would compute something else; a run with export=compressed-tensors has scales that can be shared",
            )
        if self.changed:
            return (
                f"{self.changed} blocks of NVFP4 weights are so small beside their tensor's greatest that a shared scale rounds theirs",
            )
        return ()


def _scales(specs: LinearSpecs) -> str | None:
    return None if specs.weight is None else specs.weight.scales
