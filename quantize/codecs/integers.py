"""The integer format as a codec: the grid and codes of `quantize.grid.affine`, codes packed at their bits."""

import math
from collections.abc import Sequence

import torch

from quantize.codecs.base import Codec, Encoded, Layout, checked, packed_codes, register, scale_shape
from quantize.codecs.packing import pack, unpack, unpack_at
from quantize.grid.affine import (
    Grid,
    dequantize,
    fake_quantize,
    fake_quantize_absmax,
    grouped,
    integer_range,
    quantize,
)
from quantize.grid.ranges import dynamic_grid, weight_grid
from quantize.spec.formats import INTEGER, Format
from quantize.spec.quant_spec import QuantSpec

SCALE_TYPES = {"float32": torch.float32, "float16": torch.float16, "float16_min": torch.float16}


class Integer(Codec):
    """Absmax and zero point, 2 to 8 bits, of weights (out, in). A solver's codes are packed by `store`."""

    proportional = True

    def store(self, codes: torch.Tensor, grid: Grid, spec: QuantSpec) -> Encoded:
        """Returns what is stored of codes (out, in) on `grid`: both packed, the scales in the type that `spec` names, which holds them exactly."""
        stored = {"codes": pack(codes, spec.bits), "scale": grid.scale.to(SCALE_TYPES[spec.scales])}
        if grid.zero_point is not None:
            stored["zero_point"] = pack(grid.zero_point.flatten().to(torch.uint8), spec.bits)
        return stored

    def encode(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Returns the packed codes, scales and packed zero points of a weight rounded to nearest."""
        grid = weight_grid(checked(x), spec)
        return self.store(quantize(grouped(x.detach(), spec), grid).view(x.shape), grid, spec)

    def decode(
        self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns the weight of shape `shape` that `stored` stands for, clamped to the finite range of `dtype`."""
        scale, zero_point = stored["scale"].float(), None
        if not spec.symmetric:
            zero_point = unpack(stored["zero_point"], spec.bits, scale.numel()).float().view(scale.shape)
        grid = Grid(scale, zero_point, *integer_range(spec.bits, spec.symmetric, spec.full_range))
        codes = unpack(stored["codes"], spec.bits, shape[-1], spec.symmetric)
        return dequantize(grouped(codes, spec), grid, dtype).reshape(*shape)

    def rows(self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], index: torch.Tensor) -> Encoded:
        """As `Codec.rows`; zero points, which lie bit by bit after one another, are packed again."""
        zero_point = stored.get("zero_point")
        found = super().rows({name: t for name, t in stored.items() if name != "zero_point"}, spec, shape, index)
        if zero_point is not None and stored["scale"].numel() > 1:
            each = stored["scale"].numel() // shape[0]
            places = index[:, None] * each + torch.arange(each, device=index.device)
            zero_point = pack(unpack_at(zero_point, spec.bits, places).flatten(), spec.bits)
        return found if zero_point is None else {**found, "zero_point": zero_point}

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, bytes), scales (1,), (out, 1) or (out, groups, 1), zero points packed flat."""
        scales = scale_shape(shape, spec)
        scales = (*scales, 1) if spec.granularity == "group" else scales
        layout: Layout = {"codes": packed_codes(shape, spec.bits), "scale": (scales, SCALE_TYPES[spec.scales])}
        if not spec.symmetric:
            layout["zero_point"] = packed_codes((math.prod(scales),), spec.bits)
        return layout

    def fake(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns an activation rounded to a grid fitted to its own values."""
        plain = spec.symmetric and not spec.full_range and spec.scales == "float32" and spec.clip == 1
        if plain and spec.range == "minmax" and spec.granularity in {"token", "group"}:
            return fake_quantize_absmax(grouped(x, spec), spec.bits).reshape(x.shape)
        return fake_quantize(grouped(x, spec), dynamic_grid(x, spec)).reshape(x.shape)

    def fake_weight(self, weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns a weight (out, in) rounded to the grid fitted to it."""
        return fake_quantize(grouped(weight, spec), weight_grid(weight, spec)).reshape(weight.shape)


INTEGERS = Integer()
register(
    INTEGER,
    Format(
        (8, 2, 3, 4, 5, 6, 7),
        ("channel", "tensor", "token", "group", "cluster"),
        affine=True,
        scales=("float32", "float16", "float16_min"),
    ),
    INTEGERS,
)
