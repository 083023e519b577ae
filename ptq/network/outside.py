"""What lies outside the blocks (embedding, final norm, head): changed for as long as it is held, and put back; its formats."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.network.network import Network, replace_module
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec
from quantize.spec.rules import OUTSIDE


def set_weight(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Gives `module` another parameter `name`; the old tensor, which may be tied to another module's, stays as it is."""
    old = getattr(module, name, None)
    value = value if value is None or old is None else value.to(old.dtype)
    module.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))


def tied_parameters(model: nn.Module) -> frozenset[str]:
    """Returns the full names of parameters of a model of transformers that are another's once more: none where a step has untied them."""
    return frozenset(getattr(model, "all_tied_weights_keys", None) or ()) if _is_tied(model) else frozenset()


def untied_parameters(model: nn.Module) -> frozenset[str]:
    """Returns the full names of parameters that were another's once more when the model was made, and that a step has untied."""
    return frozenset() if _is_tied(model) else frozenset(getattr(model, "all_tied_weights_keys", None) or ())


def untie(model: Any) -> None:
    """Lets embedding and head of a model of transformers be stored apart from now on."""
    model.config.get_text_config().tie_word_embeddings = False


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


@dataclass(frozen=True)
class OutsideState:
    """Which modules, parameters and buffers stand outside the blocks at one moment; no tensor is copied."""

    network: Network
    held: dict[str, tuple[nn.Module, dict[str, Any], dict[str, Any]]]

    @classmethod
    def of(cls, network: Network, names: Iterable[str] | None = None) -> Self:
        """Notes what stands there now: at these names, or wherever parameters or buffers are."""
        modules = {name: network.model.get_submodule(name) for name in (network.outside if names is None else names)}
        return cls(network, {name: (m, dict(m._parameters), dict(m._buffers)) for name, m in modules.items()})

    def put_back(self) -> None:
        """Makes what was noted stand there again."""
        for name, (module, parameters, buffers) in self.held.items():
            if self.network.model.get_submodule(name) is not module:
                replace_module(self.network.model, name, module)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


@dataclass(frozen=True)
class OutsideWeight:
    """The weight of the token embedding or of the head.

    Attributes:
        tensor: ``embedding`` or ``head``, as the scheme says.
        name: full name of the module.
        shape: (vocabulary, channels).
        spec: its format, None where it is left alone.
        tied: it is the embedding's weight once more.
    """

    tensor: str
    name: str
    shape: tuple[int, int]
    spec: QuantSpec | None
    tied: bool = False

    @property
    def parameters(self) -> int:
        """How many values it has."""
        return self.shape[0] * self.shape[1]


def outside_weights(scheme: SchemeConfig, network: Network) -> list[OutsideWeight]:
    """Returns the weights of embedding and head with their formats, those that the model has; needs no weights."""
    model = network.model
    names = {id(module): name for name, module in model.named_modules()}
    tied = _is_tied(model)
    found = []
    for tensor, module in zip(OUTSIDE, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            shape = (int(weight.shape[0]), int(weight.shape[1]))
            found.append(
                OutsideWeight(tensor, names[id(module)], shape, getattr(scheme, tensor), tied and tensor == "head")
            )
    return found


def check_outside(scheme: SchemeConfig, network: Network) -> None:
    """Raises `UserError` for a format of a weight that the model has not, that does not fit it, or of one of two tied weights."""
    found = {weight.tensor: weight for weight in outside_weights(scheme, network)}
    for tensor in OUTSIDE:
        spec: QuantSpec | None = getattr(scheme, tensor)
        if spec is None:
            continue
        if tensor not in found:
            raise UserError(f"scheme.{tensor}: this model has no such weight: use null")
        columns = found[tensor].shape[1]
        if spec.group_size is not None and columns % spec.group_size:
            close = min(
                (d for d in range(1, columns + 1) if columns % d == 0), key=lambda d: abs(d - (spec.group_size or 0))
            )
            raise UserError(
                f"scheme.{tensor}.group_size: {spec.group_size} does not divide its {columns} channels: use {close}"
            )
    if "head" in found and found["head"].tied and scheme.head != scheme.embedding:
        raise UserError(
            "scheme.head: another format than scheme.embedding, but this model ties the two weights: give both the same"
        )


class RoundedOutside:
    """Rounds the weights of embedding and head to nearest where the scheme gives them a format; a change of `BlockStream.outside`.

    Called each time that they are held, after the transforms' changes; rounded once for as long as the weights are the same.
    """

    def __init__(self, scheme: SchemeConfig, network: Network):
        self._weights, self._network = [w for w in outside_weights(scheme, network) if w.spec is not None], network
        self._last: dict[str, tuple[torch.Tensor, nn.Parameter]] = {}

    def __bool__(self) -> bool:
        return bool(self._weights)

    @torch.no_grad()
    def __call__(self) -> None:
        """Gives the modules their rounded weights; the old tensors stay as they are."""
        made: dict[int, nn.Parameter] = {}
        for weight in self._weights:
            module = self._network.model.get_submodule(weight.name)
            old = module.weight
            if id(old) not in made:
                made[id(old)] = self._rounded(weight, old)
            module.register_parameter("weight", made[id(old)])

    def _rounded(self, weight: OutsideWeight, old: torch.Tensor) -> nn.Parameter:
        known = self._last.get(weight.name)
        if known is not None and known[0] is old:
            return known[1]
        if weight.spec is None:
            raise ValueError(f"{weight.name} has no format")
        rounded = codec_of(weight.spec).fake_weight(old.float(), weight.spec).to(old.dtype)
        parameter = nn.Parameter(rounded, requires_grad=False)
        self._last[weight.name] = (old, parameter)
        return parameter
