"""Q4_K, Q5_K and Q6_K: what llama.cpp calls K-quants (ggml-quants.c), as codecs of weights."""

from collections.abc import Sequence

import torch

from quantize.codecs.base import Codec, Encoded, Layout, packed_codes, register, scale_shape
from quantize.codecs.k_quants.fitting import SUPERBLOCK, Form, codes_of, fitted, scales_of
from quantize.grid.affine import grouped
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec


class KQuant(Codec):
    """Codes in blocks of a row with a step (and a least value) each, themselves codes of 6 or 8 bits in superblocks of 256."""

    def __init__(self, form: Form):
        self.form, self.width = form, form.bits

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (out, bytes), the blocks' scales (out, blocks), fp16 units (out, superblocks), the last of which may be shorter."""
        rows, columns = shape
        blocks, units = scale_shape(shape, spec), (rows, -(-columns // SUPERBLOCK))
        kind = torch.uint8 if self.form.least else torch.int8
        layout: Layout = {
            "codes": packed_codes(shape, self.width),
            "scale": (blocks, kind),
            "step": (units, torch.float16),
        }
        return layout | (
            {"least": (blocks, torch.uint8), "least_step": (units, torch.float16)} if self.form.least else {}
        )

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes uint8 (out, in), and scales fitted by least squares."""
        grouped(x, spec)
        scales = fitted(x, self.form)
        blocks = x.float().unflatten(1, (-1, self.form.block))
        codes = codes_of(blocks, scales.steps(), scales.leasts(), self.form)
        return {"codes": codes.to(torch.uint8).view(x.shape), **scales.stored()}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Code less middle, times step, less the least value."""
        scales = scales_of(parts, self.form)
        levels = parts["codes"].float().sub_(self.form.middle).unflatten(1, (-1, self.form.block))
        return levels.mul_(scales.steps()[..., None]).sub_(scales.leasts()[..., None]).reshape(*shape)


_INSTEAD = "int with granularity group"
FORMS = {"q4_k": Form(4, 32, 63, True), "q5_k": Form(5, 32, 63, True), "q6_k": Form(6, 16, 127, False)}
register("q4_k", Format((4,), ("group",), 32, True, activation=False, instead=_INSTEAD), KQuant(FORMS["q4_k"]))
register("q5_k", Format((5,), ("group",), 32, True, activation=False, instead=_INSTEAD), KQuant(FORMS["q5_k"]))
register("q6_k", Format((6,), ("group",), 16, True, activation=False, instead=_INSTEAD), KQuant(FORMS["q6_k"]))
