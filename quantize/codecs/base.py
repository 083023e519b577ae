"""What every block format shares: one pair of functions is both the simulation and the storage."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from quantize.checks import all_finite
from quantize.codecs.packing import pack, packed_length, unpack
from quantize.grid.affine import grouped
from quantize.spec.formats import Format, register_format
from quantize.spec.quant_spec import QuantSpec

Encoded = dict[str, torch.Tensor]
"""The tensors of one encoded tensor, by name; ``codes`` is packed at the format's bits."""
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of `Encoded`."""


class Codec:
    """One number format, as two functions: `quantize` and `dequantize`.

    `encode`, `decode` and `fake` follow from them, so that what is simulated is what is stored.
    """

    width = 8
    """Bits of a code, where codes are packed integers; 8 where they are stored as they are."""
    signed = False
    """Whether the codes are int8 rather than uint8."""
    proportional = False
    """Whether a weight is proportional to the floats that are stored as ``scale``, which may then be changed: codes stay."""
    stacked_rows: int | None = None
    """Of a format of tiles: rows whose multiples can be coded one below the other as one weight, and taken apart again."""

    def couples_tokens(self, spec: QuantSpec) -> bool:
        """Returns whether what becomes of a value depends on other tokens that are rounded with it."""
        return spec.granularity == "tensor"

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Returns codes, one a byte, and scales of `x` (..., n). NaN and inf spread through the scale."""
        raise TypeError(f"{type(self).__name__} does not say how it quantizes")

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Returns the float32 values of shape `shape` that `parts`, as `quantize` gives them, stand for."""
        raise TypeError(f"{type(self).__name__} does not say how it dequantizes")

    def encode(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Returns what is stored of `x` (..., n), codes packed along the last dimension.

        Raises:
            ValueError: for NaN or inf, an integer tensor, a tensor without data, or a group size that does not divide.
        """
        parts = self.quantize(checked(x), spec)
        return {**parts, "codes": pack(parts["codes"], self.width)} if self.width < 8 else parts

    def decode(
        self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns the tensor of shape `shape` that `stored` stands for, in `dtype`, clamped to its finite range."""
        if self.width < 8:
            stored = {**stored, "codes": unpack(stored["codes"], self.width, shape[-1], self.signed)}
        return saturated(self.dequantize(stored, spec, shape), dtype)

    def rows(self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], index: torch.Tensor) -> Encoded:
        """Returns what is stored of some rows of a weight of `shape` (out, in): `decode` gives them with shape (n, in).

        Args:
            stored: of the whole weight.
            spec: its format.
            shape: (out, in).
            index: which rows, int64 (n,), each as often as it is wanted.

        Raises:
            ValueError: for a format whose rows are not stored by themselves.
        """
        return {name: _rows_of(tensor, name, shape[0], index) for name, tensor in stored.items()}

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Returns the shapes and dtypes that `encode` gives for a weight of `shape` (out, in), which needs no values.

        Raises:
            ValueError: for a group size that does not divide.
        """
        raise TypeError(f"{type(self).__name__} does not say what it stores")

    def layout_bytes(self, shape: Sequence[int], spec: QuantSpec) -> int:
        """Returns the bytes of all tensors of `layout`. Raises as it does."""
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.layout(shape, spec).values())

    def fake(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns ``decode(encode(x))`` in the type of `x`, without packing; NaN and inf spread instead of being refused."""
        return saturated(self.dequantize(self.quantize(x, spec), spec, x.shape), x.dtype)

    def static_scale(self, minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
        """Returns the scale (1,) of an activation by its statistics (channels,), of a format that `Format.static` says so of."""
        raise ValueError(f"{type(self).__name__} fits its scales at each call")

    def fake_static(self, x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns the activation `x` rounded with the scale that `static_scale` gave."""
        raise ValueError(f"{type(self).__name__} fits its scales at each call")

    def fake_weight(self, weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns what a weight (out, in) becomes, as `fake`."""
        return self.fake(weight, spec)


_CODECS: dict[str, Codec] = {}


def register(name: str, form: Format, codec: Codec) -> None:
    """Makes a number format known as `name`: what it allows, and how it is encoded. Called where the codec is written.

    Raises:
        ValueError: when another format has that name.
    """
    register_format(name, form)
    _CODECS[name] = codec


def registered_codec(name: str) -> Codec:
    """Returns the codec that was registered as `name`; `quantize.codecs.registry` sees to it that all are."""
    return _CODECS[name]


def stored_bytes(stored: Encoded) -> int:
    """Returns the bytes of all tensors of an encoded tensor."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def _rows_of(tensor: torch.Tensor, name: str, rows: int, index: torch.Tensor) -> torch.Tensor:
    """Returns rows of what is stored row by row; what there is one of belongs to all rows."""
    if tensor.numel() == 1:
        return tensor
    if tensor.dim() < 2 or len(tensor) != rows:
        raise ValueError(f"{name}: is not stored row by row in this format")
    # As bytes: 8-bit floats cannot be chosen from everywhere.
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw[index].view(tensor.dtype)


def packed_codes(shape: Sequence[int], width: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Returns shape and dtype of codes of `shape` packed along the last dimension at `width` bits."""
    return (*shape[:-1], packed_length(shape[-1], width)), torch.uint8


def scale_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    """Returns the shape of a weight's scales: (1,) for the tensor, (out, 1) a channel, (out, groups) a group.

    Raises:
        ValueError: for a group size that does not divide the columns, or a granularity whose scales do not follow from
            a shape (cluster) or that a weight does not have (token).
    """
    if spec.granularity == "tensor":
        return (1,)
    if spec.granularity == "channel":
        return (shape[0], 1)
    if spec.granularity == "group":
        return tuple(grouped(torch.empty(shape, device="meta"), spec).shape[:-1])
    raise ValueError(f"granularity: {spec.granularity!r}: a weight's scales do not follow from its shape: use channel")


def checked(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` detached. ValueError, saying which, for a tensor that is not floating point, has no data, or NaN or inf."""
    if not x.is_floating_point():
        raise ValueError(f"the weight is {x.dtype}: only a floating-point tensor can be quantized")
    if x.is_meta:
        raise ValueError("the weight is on the meta device: it has no values to quantize")
    if not all_finite(x):
        raise ValueError("the weight holds NaN or inf")
    return x.detach()


def absmax(x: torch.Tensor) -> torch.Tensor:
    """Returns max|x| over the last dimension, kept, in float32."""
    # amin and amax: along a dimension, vector_norm(inf) was measured 8 to 10 times slower on CPU.
    return torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)).abs_().float()


def greatest_seen(minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Returns the greatest magnitude (1,), float32, of an activation by its statistics (channels,)."""
    return torch.maximum(-minimum.min(), maximum.max()).clamp(min=0).float().reshape(1)


def divided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns ``x / scale`` in float32, 0 where the scale is 0 or below float32's normal numbers."""
    tiny = torch.finfo(torch.float32).tiny
    return x.float() / torch.where(scale < tiny, torch.full_like(scale, torch.inf), scale)


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `values` in `dtype`, with what lies beyond its greatest number at that number; NaN stays."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def flat_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Returns `x` as (blocks, size) in row-major order; a shorter last block is filled up with zeros."""
    x = x.reshape(-1)
    return torch.nn.functional.pad(x, (0, -len(x) % size)).view(-1, size)


def keep_dtypes(module: nn.Module, names: Sequence[str], apply: Callable[[], Any]) -> Any:
    """Runs `apply` (what ``.to``, ``.half`` and ``.cuda`` do to buffers), and keeps the types of codes and scales:
    in another they would no longer be what was encoded, and small scales would become 0.
    """
    before = {name: getattr(module, name, None) for name in names}
    result = apply()
    for name, tensor in before.items():
        if tensor is not None and getattr(module, name).dtype != tensor.dtype:
            setattr(module, name, tensor.to(getattr(module, name).device))
    return result
