"""MXFP4 and MXFP8: blocks of 32 with a power-of-two scale (OCP Microscaling Formats 1.0, sections 5 and 6.3)."""

from collections.abc import Sequence

import torch

from quantize.codecs.base import Codec, Encoded, Layout, absmax, packed_codes, register, scale_shape
from quantize.codecs.e2m1 import e2m1_codes, e2m1_values
from quantize.codecs.fp8 import to_float8
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec

BIAS = 127
NAN_SCALE = 255


class Microscaling(Codec):
    """Elements over ``2^(floor(log2 max|x|) - emax)``, the element type's greatest exponent being `emax`; saturating.

    `parts["scale"]` is E8M0: uint8 (..., blocks), exponent + 127; 255 is NaN.
    """

    emax = 0

    def to_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes of values already divided by their scale."""
        raise TypeError(f"{type(self).__name__} does not say what its elements are")

    def to_values(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the float32 values of `codes`."""
        raise TypeError(f"{type(self).__name__} does not say what its elements are")

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, bytes) or elements (out, in), and scales (out, blocks)."""
        return {"codes": self.codes_layout(shape), "scale": (scale_shape(shape, spec), torch.uint8)}

    def codes_layout(self, shape: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the stored elements."""
        return packed_codes(shape, self.width)

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes (..., n) and scales (..., blocks)."""
        blocks = grouped(x, spec)
        scale = e8m0_scale(absmax(blocks), self.emax)
        codes = self.to_codes(blocks.float() / e8m0_values(scale)).view(x.shape)
        return {"codes": codes, "scale": scale.squeeze(-1)}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Element times scale."""
        blocks = grouped(self.to_values(parts["codes"]).view(shape), spec)
        return (blocks * e8m0_values(parts["scale"]).unsqueeze(-1)).reshape(shape)


class MicroscalingE2M1(Microscaling):
    """MXFP4."""

    width, emax = 4, 2

    def to_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of E2M1."""
        return e2m1_codes(x)

    def to_values(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of E2M1."""
        return e2m1_values(codes)


class MicroscalingFloat8(Microscaling):
    """MXFP8 with elements E4M3 or E5M2."""

    def __init__(self, dtype: torch.dtype, emax: int):
        self.dtype, self.emax = dtype, emax

    def codes_layout(self, shape: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """Elements in their type."""
        return tuple(shape), self.dtype

    def to_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Elements in their type."""
        return to_float8(x, self.dtype)

    def to_values(self, codes: torch.Tensor) -> torch.Tensor:
        """Elements in float32."""
        return codes.float()


def e8m0_scale(greatest: torch.Tensor, emax: int) -> torch.Tensor:
    """Returns the E8M0 scale, uint8, of blocks whose greatest magnitude is `greatest`: exponent + 127, at least 0.

    A block of zeros gets the least scale, 2^-127. NaN and inf give 255, NaN.
    """
    # frexp's mantissa lies in [.5, 1): its exponent is floor(log2) + 1, exact for subnormal numbers too.
    _, exponent = torch.frexp(greatest)
    exponent = torch.where(greatest == 0, torch.full_like(exponent, -BIAS), exponent - 1 - emax)
    code = (exponent + BIAS).clamp_(0, NAN_SCALE - 1)
    return torch.where(torch.isfinite(greatest), code, torch.full_like(code, NAN_SCALE)).to(torch.uint8)


def e8m0_values(scale: torch.Tensor) -> torch.Tensor:
    """Returns the float32 powers of two that E8M0 codes stand for; NaN for 255."""
    values = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - BIAS)
    return torch.where(scale == NAN_SCALE, torch.full_like(values, torch.nan), values)


MXFP4 = MicroscalingE2M1()
MXFP8_E4M3 = MicroscalingFloat8(torch.float8_e4m3fn, 8)
MXFP8_E5M2 = MicroscalingFloat8(torch.float8_e5m2, 15)
register("mxfp4", Format((4,), ("group",), 32, True), MXFP4)
register("mxfp8", Format((8,), ("group",), 32, True), MXFP8_E4M3)
register("mxfp8_e5m2", Format((8,), ("group",), 32, True), MXFP8_E5M2)
