"""NVFP4: E2M1 in blocks of 16, an E4M3 scale a block and one float32 scale a tensor (NVIDIA's two-level scaling)."""

from collections.abc import Sequence

import torch

from quantize.codecs.base import Codec, Encoded, Layout, absmax, divided, packed_codes, register, scale_shape
from quantize.codecs.e2m1 import E2M1_MAX, e2m1_codes, e2m1_values
from quantize.codecs.fp8 import to_float8
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec

SCALE_TYPE = torch.float8_e4m3fn
SCALE_MAX = 448.0


class Nvfp4(Codec):
    """The tensor's scale is absmax / (6 · 448), so that the greatest block's own scale is E4M3's greatest number.

    On activations the tensor's scale is each sample's own (`quantize.modules.simulated.fake_quantize_dynamic`).
    """

    width = 4

    def couples_tokens(self, spec: QuantSpec) -> bool:
        """True: by the tensor's scale."""
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
        tensor_scale = greatest.amax().reshape(1) / (E2M1_MAX * SCALE_MAX)
        scale = to_float8(divided(greatest / E2M1_MAX, tensor_scale), SCALE_TYPE)
        codes = e2m1_codes(divided(blocks, scale.float() * tensor_scale)).view(x.shape)
        return {"codes": codes, "scale": scale.squeeze(-1), "tensor_scale": tensor_scale}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Element times the block's scale times the tensor's."""
        blocks = grouped(e2m1_values(parts["codes"]).view(shape), spec)
        return (blocks * (parts["scale"].float() * parts["tensor_scale"]).unsqueeze(-1)).reshape(shape)


NVFP4 = Nvfp4()
register("nvfp4", Format((4,), ("group",), 16, True), NVFP4)
