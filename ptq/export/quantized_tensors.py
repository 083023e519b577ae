"""What exporters read from: the quantized model's tensors, one at a time, from memory or from a finished run's folder."""

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.network.attention import AttentionQuantizers
from ptq.network.experts.linears import Expert
from ptq.network.network import Block, Network, is_inside, weight_of
from ptq.network.outside import tied_parameters
from quantize.codecs.base import Encoded
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, dequantize, grouped, integer_range
from quantize.kernels.matmul import Linear
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.solvers.lowrank import Factors
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class LinearTensors:
    """One Linear as it is stored.

    Attributes:
        name: full module name.
        spec: format of the weight, or None when it is in floating point.
        codes: (out, in), int8 (symmetric) or uint8; None when the weight is in floating point.
        scale: float32, broadcastable to ``grouped(codes, spec)``.
        zero_point: float32 whole numbers of that shape, or None.
        weight: (out, in) in floating point when `spec` is None.
        bias: (out,) or None.
        input_spec: format of the input, or None.
        input_scale: float32, of a static input range.
        input_zero_point: float32, of a static asymmetric input range.
        stored: what is stored of a weight whose format is not an integer grid, by name; None for others.
    """

    name: str
    spec: QuantSpec | None
    codes: torch.Tensor | None
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    input_spec: QuantSpec | None = None
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None
    stored: Encoded | None = None

    def dense(self) -> torch.Tensor:
        """Returns the weight (out, in) that the codes stand for, in float32; what corrects it is beside it (`QuantizedTensors.correction`)."""
        if self.spec is None or self.codes is None or self.scale is None:
            return torch.as_tensor(self.weight).float()
        if self.stored is not None:
            codec = codec_of(self.spec)
            rows, width = self.codes.shape
            return codec.decode(self.stored, self.spec, (rows, width * 8 // codec.width))
        grid = Grid(
            self.scale, self.zero_point, *integer_range(self.spec.bits, self.spec.symmetric, self.spec.full_range)
        )
        return dequantize(grouped(self.codes, self.spec), grid).reshape(self.codes.shape)

    def row_scales(self) -> torch.Tensor:
        """Returns the scales as (out, scales a row); (1, 1) for granularity tensor."""
        return _per_row(torch.as_tensor(self.scale), self)

    def row_zero_points(self) -> torch.Tensor | None:
        """Returns the zero points in the shape of `row_scales`, or None."""
        return None if self.zero_point is None else _per_row(self.zero_point, self)


def _per_row(values: torch.Tensor, tensors: LinearTensors) -> torch.Tensor:
    if values.numel() == 1:
        return values.reshape(1, 1)
    return values.reshape(torch.as_tensor(tensors.codes).shape[0], -1)


class QuantizedTensors(Protocol):
    """A quantized model, read tensor by tensor."""

    network: Network
    tokenizer: Any
    scheme: SchemeConfig
    origin: pathlib.Path | None
    """The GGUF file that the model was read from, or None."""

    def linear(self, name: str) -> LinearTensors:
        """Returns the tensors of the Linear `name`."""

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the parameter or buffer `name` of the model, in floating point."""

    def correction(self, name: str) -> Factors | None:
        """Returns what is added to the weight of the Linear `name`, or None."""


OWN = ("ptq.", "quantize.", "group_methods.")
"""What the full names of classes begin with that steps put into a block."""
HELD = (Linear, QuantLinear, InputQuantizer, Expert)
"""Those that every format has a place for."""


def refuse_foreign(block: Block, corrections: bool = False) -> None:
    """Raises `UserError` where a step has put something into the block that no format has a place for.

    Args:
        block: as it is quantized.
        corrections: products of low rank that are added to weights have a place, or are looked at elsewhere.
    """
    for name, module in block.module.named_modules():
        if isinstance(module, QuantLinear) and module.corrected and not corrections:
            raise unheld_correction(f"{block.name}.{name}")
        ours = f"{type(module).__module__}.".startswith(OWN)
        cached = isinstance(module, AttentionQuantizers) and not module.transforms and module.cache is None
        if ours and not cached and not isinstance(module, HELD):
            raise foreign(type(module).__name__, f"{block.name}.{name}")


def foreign(kind: str, name: str) -> UserError:
    """Returns what is said where a step has put a module of the class `kind` at `name`, and no format has a place for it."""
    return UserError(f"export: a step has put {kind} at {name}, which no format can hold: leave the step out")


def unheld_correction(name: str) -> UserError:
    """Returns what is said where the weight of the Linear `name` is corrected and the export would lose that."""
    return UserError(
        f"export: a step has added a product of low rank to {name}, which this format cannot hold, and its `acts` do not say so: "
        "leave the step out"
    )


def walked(
    source: QuantizedTensors, within: Sequence[str] = ("",), without: Sequence[str] = ()
) -> Iterator[tuple[str, bool]]:
    """Yields, in the order of the model, (full name, True) of every Linear of the blocks and (full name, False) of every parameter
    and stored buffer beside them; tied ones once.

    Args:
        source: the model.
        within: names of the modules that are walked; "" is the model.
        without: names of those that are left out.
    """
    model, linears = source.network.model, source.network.linears.keys()
    tied = tied_parameters(model)
    for owner, module in model.named_modules():
        if not _inside(owner, within) or _inside(owner, without):
            continue
        if owner in linears:
            yield owner, True
            continue
        if is_inside(owner, linears):
            continue
        own = [name for name, _ in module.named_parameters(recurse=False)]
        own += [
            name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set
        ]
        for name in (f"{owner}.{n}" if owner else n for n in own):
            if name not in tied:
                yield name, False


def _inside(owner: str, names: Sequence[str]) -> bool:
    return any(not name or owner == name or owner.startswith(f"{name}.") for name in names)


def narrowed(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Returns a parameter outside the blocks as it is stored: a matrix rounded to `dtype`, where there is one; all else as it is."""
    return value if dtype is None or value.dim() < 2 else value.to(dtype)


class ResidentSource:
    """A quantized model that is in memory. Matrices outside its blocks are rounded to the type `narrow`, where there is one."""

    def __init__(
        self,
        network: Network,
        tokenizer: Any,
        scheme: SchemeConfig,
        origin: pathlib.Path | None = None,
        narrow: torch.dtype | None = None,
    ):
        self.network, self.tokenizer, self.scheme, self.origin = network, tokenizer, scheme, origin
        self._narrow, self._outside = narrow, frozenset(network.outside)
        for block in network.blocks:
            refuse_foreign(block, corrections=True)

    def linear(self, name: str) -> LinearTensors:
        """Returns the tensors of the Linear `name`: the module's own, no copies."""
        return tensors_of(name, self.network.model.get_submodule(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the parameter or buffer `name` itself, or rounded."""
        owner, _, last = name.rpartition(".")
        value = getattr(self.network.model.get_submodule(owner), last)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is no tensor")
        return narrowed(value, self._narrow) if owner in self._outside else value

    def correction(self, name: str) -> Factors | None:
        """Returns the module's own factors, no copies, or None."""
        module = self.network.model.get_submodule(name)
        if not isinstance(module, QuantLinear) or module.left is None or module.right is None:
            return None
        return Factors(module.left, module.right)


def rounded(name: str, weight: torch.Tensor, spec: QuantSpec) -> LinearTensors:
    """Returns a weight (out, in) outside the blocks as it is stored, rounded to nearest as the run has done."""
    return tensors_of(name, QuantLinear(weight, None, spec))


def tensors_of(name: str, module: nn.Module) -> LinearTensors:
    """Returns the tensors of `module`, a `QuantLinear` or a Linear that was left alone."""
    if not isinstance(module, QuantLinear):
        bias = module.bias if isinstance(module.bias, torch.Tensor) else None
        return LinearTensors(name, None, None, None, None, weight_of(module), bias)
    inputs = module.inputs
    affine = module.weight_spec is None or module.weight_spec.affine
    return LinearTensors(
        name=name,
        spec=module.weight_spec,
        codes=None if module.weight_spec is None else module.codes,
        scale=None if module.weight_spec is None else module.scale,
        zero_point=module.zero_point if module.weight_spec is not None and affine else None,
        weight=module.weight if module.weight_spec is None else None,
        bias=module.bias,
        input_spec=module.input_spec,
        input_scale=None if inputs is None or inputs.spec.dynamic else inputs.scale,
        input_zero_point=None if inputs is None or inputs.spec.dynamic else inputs.zero_point,
        stored=None if affine else {part: getattr(module, part) for part in module.stored_names},
    )
