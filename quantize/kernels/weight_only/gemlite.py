"""gemlite's Triton kernels on CUDA, an optional extra: an activation in 16 bits with 2-, 4- or 8-bit codes, or with MXFP4."""

from typing import Any

import torch

from quantize.codecs.mx import NAN_SCALE
from quantize.codecs.packing import unpack
from quantize.kernels.floating import Product, StoredWeight, lacks, register_floating
from quantize.spec.quant_spec import QuantSpec

WIDTHS = (2, 4, 8)
"""Bits of a code as it packs them; others go into the next wider."""
STEP = 32
"""What it wants the columns of the weight to be a multiple of."""
LEAST_GROUP = 16
PACKAGES = ("gemlite", "triton")


class Gemlite:
    """``gemlite.helper.A16Wn``: codes are unpacked and scaled in the registers of the product."""

    name = "gemlite"
    rounds = False

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Integers with a scale a row or for groups of 16 columns and more, and MXFP4; models in 16 bits on CUDA."""
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        integers = weight.affine and weight.granularity in {"channel", "tensor", "group"}
        if not integers and weight.format != "mxfp4":
            return "it takes integers with one scale a row or a group, and mxfp4"
        if dtype not in {torch.float16, torch.bfloat16}:
            return f"it multiplies no {dtype}".replace("torch.", "")
        if shape[1] % STEP:
            return f"it takes weights whose columns (here {shape[1]}) are a multiple of {STEP}"
        if integers and weight.granularity == "group" and (weight.group_size or 0) < LEAST_GROUP:
            return f"it takes groups of {LEAST_GROUP} columns and more"
        return lacks(PACKAGES, "gemlite")

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Its own packed codes, and scale and zero point of a group in the model's type."""
        group = weight.group_size if weight.granularity == "group" else None
        return _width(weight) + (0 if group is None else 2 * 8 * dtype.itemsize / group)

    def prepare(self, weight: StoredWeight) -> Product:
        """Packs the codes its own way."""
        module, rows = (_integers if weight.spec.affine else _mxfp4)(weight), weight.shape[0]

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if not len(x):
                return x.new_zeros(0, rows)
            result: torch.Tensor = module(x.detach())
            return result

        return multiply


def _width(spec: QuantSpec) -> int:
    return next(width for width in WIDTHS if width >= spec.bits)


def _integers(weight: StoredWeight) -> Any:
    from gemlite.helper import A16Wn

    spec, columns = weight.spec, weight.shape[1]
    width, codes, scale, zero = _width(spec), weight.codes(), weight.scales(), weight.zeros()
    # It counts from 0: symmetric codes from the middle of the width that they lie in.
    middle = 2 ** (width - 1)
    codes = (codes.to(torch.int16) + middle).to(torch.uint8) if spec.symmetric else codes
    zeros = torch.full_like(scale, middle) if zero is None else zero.to(scale.dtype)
    return A16Wn(device=scale.device, dtype=weight.dtype).from_weights(
        codes.contiguous(), scale.contiguous(), zeros.contiguous(), W_nbits=width, group_size=columns // scale.shape[1]
    )


def _mxfp4(weight: StoredWeight) -> Any:
    from gemlite.helper import A16Wn

    stored, columns = weight.stored, weight.shape[1]
    scale = stored["scale"]
    if bool((scale == NAN_SCALE).any()):
        raise ValueError("weight: a block of it holds NaN or inf")
    codes = unpack(stored["codes"], weight.spec.bits, columns)
    return A16Wn(device=scale.device, dtype=weight.dtype).from_weights(
        codes, scale.view(torch.float8_e8m0fnu), None, W_nbits=weight.spec.bits,
        group_size=columns // scale.shape[1], quant_type="MXFP",
    )  # fmt: skip


register_floating(Gemlite())
