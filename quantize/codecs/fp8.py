"""FP8: E4M3 and E5M2 with one float32 scale a tensor, channel, token or group (Micikevicius et al. 2022); stored as torch.float8."""

from collections.abc import Sequence

import torch

from quantize.codecs.base import Codec, Encoded, Layout, absmax, divided, greatest_seen, register, scale_shape
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec


class Float8(Codec):
    """Values over absmax / the type's greatest number, rounded to the type: half to even, saturating."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.greatest = torch.finfo(dtype).max

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, in) in the type; scales (1,), (out, 1) or (out, groups)."""
        return {"codes": (tuple(shape), self.dtype), "scale": (scale_shape(shape, spec), torch.float32)}

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes (..., n) in the type; scales (1,) for a tensor, (..., 1) a row or (..., groups), float32."""
        values = grouped(x, spec)
        scale = absmax(values.reshape(-1) if spec.granularity == "tensor" else values) / self.greatest
        codes = to_float8(divided(values, scale), self.dtype).view(x.shape)
        return {"codes": codes, "scale": scale.squeeze(-1) if spec.granularity == "group" else scale}

    def static_scale(self, minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
        """Returns the one scale (1,), float32, that carries the greatest magnitude of statistics (channels,) to the type's."""
        return greatest_seen(minimum, maximum) / self.greatest

    def fake_static(self, x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns an activation rounded with a given scale (1,), in its type; what is beyond its range saturates, NaN stays."""
        return (to_float8(divided(x.float(), scale), self.dtype).float() * scale).to(x.dtype)

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Code times scale."""
        scale = parts["scale"].unsqueeze(-1) if spec.granularity == "group" else parts["scale"]
        return grouped(parts["codes"].float(), spec).mul(scale).reshape(shape)


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `x` in an 8-bit float type, saturating: a plain conversion makes NaN or inf of what is too great."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


FP8_E4M3 = Float8(torch.float8_e4m3fn)
FP8_E5M2 = Float8(torch.float8_e5m2)
_FORM = Format((8,), ("channel", "tensor", "token", "group"), static="tensor")
register("fp8_e4m3", _FORM, FP8_E4M3)
register("fp8_e5m2", _FORM, FP8_E5M2)
