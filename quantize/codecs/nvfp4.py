"""NVFP4: E2M1 in blocks of 16, an E4M3 scale a block and one float32 scale a tensor (NVIDIA's two-level scaling)."""

from collections.abc import Sequence

import torch

from quantize.codecs.base import (
    Codec,
    Encoded,
    Layout,
    absmax,
    divided,
    greatest_seen,
    packed_codes,
    register,
    saturated,
    scale_shape,
)
from quantize.codecs.e2m1 import E2M1_MAX, e2m1_codes, e2m1_values
from quantize.codecs.fp8 import to_float8
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec

SCALE_TYPE = torch.float8_e4m3fn
SCALE_MAX = 448.0


class Nvfp4(Codec):
    """The tensor's scale is absmax / (6 · 448), so that the greatest block's own scale is E4M3's greatest number.

    On activations the tensor's scale is each sample's own (`quantize.modules.simulated.fake_quantize_dynamic`), or one that
    statistics gave, with which a token's blocks have scales that depend on no other token.
    """

    width = 4

    def couples_tokens(self, spec: QuantSpec) -> bool:
        """True: by the tensor's scale. Who rounds under a static one does not ask."""
        return True

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, bytes), scales (out, blocks), one scale of the tensor."""
        scales = scale_shape(shape, spec)
        codes = packed_codes(shape, self.width)
        return {"codes": codes, "scale": (scales, SCALE_TYPE), "tensor_scale": ((1,), torch.float32)}

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes (..., n), scales E4M3 (..., blocks), tensor_scale float32 (1,)."""
        blocks = grouped(x, spec)
        greatest = absmax(blocks)
        return _encoded(blocks, greatest, tensor_scale(greatest.amax(), spec), x.shape)

    def static_scale(self, minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
        """Returns the tensor's scale (1,), float32, of the greatest magnitude of statistics (channels,)."""
        return _reaching(greatest_seen(minimum, maximum))

    def fake_static(self, x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Returns an activation rounded under a given scale of the tensor (1,), in its type; a block beyond its range saturates."""
        blocks = grouped(x, spec)
        parts = _encoded(blocks, absmax(blocks), scale, x.shape)
        return saturated(self.dequantize(parts, spec, x.shape), x.dtype)

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Element times the block's scale times the tensor's."""
        blocks = grouped(e2m1_values(parts["codes"]).view(shape), spec)
        return (blocks * (parts["scale"].float() * parts["tensor_scale"]).unsqueeze(-1)).reshape(shape)


def tensor_scale(greatest: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns the tensor's scale (1,), float32, for its greatest magnitude; `spec.scales` may ask for the power of two above it."""
    scale = _reaching(greatest)
    if spec.scales != "power_of_two":
        return scale
    mantissa, exponent = torch.frexp(scale)
    above = torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return torch.where(scale > 0, above, scale)


def with_tensor_scale(stored: Encoded, scale: torch.Tensor) -> tuple[Encoded, int]:
    """Returns a weight's `stored` tensors under another scale of the tensor, and how many of its blocks that changes.

    Args:
        stored: as the codec encodes it with ``scales: power_of_two``.
        scale: (1,), a power of two not below the tensor's own. The blocks' scales are divided by the same power, which
            changes those alone that E4M3 then holds with fewer digits, below 2^-6.
    """
    ratio = divided(stored["tensor_scale"], scale)  # 0 for weights of zeros alone
    exact = stored["scale"].float() * ratio
    moved = exact.to(SCALE_TYPE)
    return {**stored, "scale": moved, "tensor_scale": scale}, int((moved.float() != exact).sum())


def _reaching(greatest: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's scale (1,), float32, under which a block of this magnitude has E4M3's greatest scale."""
    return greatest.float().reshape(1) / (E2M1_MAX * SCALE_MAX)


def _encoded(blocks: torch.Tensor, greatest: torch.Tensor, scale: torch.Tensor, shape: Sequence[int]) -> Encoded:
    """Returns codes of `shape`, the blocks' scales, and the tensor's `scale`; `greatest` has each block's magnitude (..., blocks, 1)."""
    own = to_float8(divided(greatest / E2M1_MAX, scale), SCALE_TYPE)
    codes = e2m1_codes(divided(blocks, own.float() * scale)).view(shape)
    return {"codes": codes, "scale": own.squeeze(-1), "tensor_scale": scale}


NVFP4 = Nvfp4()
register("nvfp4", Format((4,), ("group",), 16, True, scales=("float32", "power_of_two"), static="group"), NVFP4)
