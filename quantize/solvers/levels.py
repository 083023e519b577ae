"""What a column of weights can be rounded to, for a solver of any format: a row's scale times one of the format's levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantize.codecs.base import Codec, Encoded, absmax, divided
from quantize.codecs.codebook import Codebook, dequantize_scales, quantize_scales
from quantize.codecs.e2m1 import E2M1_MAX, e2m1_codes, round_e2m1
from quantize.codecs.fp8 import Float8, to_float8
from quantize.codecs.k_quants.codec import KQuant
from quantize.codecs.k_quants.fitting import fitted
from quantize.codecs.mx import BIAS, Microscaling, e8m0_scale, e8m0_values
from quantize.codecs.nvfp4 import SCALE_TYPE, Nvfp4, tensor_scale
from quantize.codecs.packing import pack
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, grouped
from quantize.grid.labelled_grid import LabelledGrid
from quantize.grid.scales import rounded_scales
from quantize.spec.quant_spec import QuantSpec


class Levels:
    """The values that the weights of a column can take: ``scale[label]``, one a row, times a level.

    Attributes:
        scale: float32 (labels, out); exactly what is stored.
        shared: whether all rows have one scale.
    """

    def __init__(self, scale: torch.Tensor, shared: bool):
        # A copy: a transpose that is contiguous as it is would be the caller's own tensor.
        self.scale, self.shared = scale.clone(memory_format=torch.contiguous_format), shared

    def round(self, label: int, column: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes the level nearest to `column` (out,) over its scale into `out`, and returns the scale (out,)."""
        raise TypeError(f"{type(self).__name__} does not say what its levels are")

    def storable(self, scale: torch.Tensor) -> torch.Tensor | None:
        """Returns the scales nearest to `scale` (out,), above 0, that the format can store; None when they cannot be changed."""
        raise TypeError(f"{type(self).__name__} does not say what its scales are")

    def set_scale(self, label: int, scale: torch.Tensor) -> None:
        """Changes the scales (out,) of a label to what `storable` gave."""
        self.scale[label] = scale

    def shift(self, label: int, steps: torch.Tensor) -> torch.Tensor | None:
        """Adds `steps` (out,), whole numbers, to every level of the rows with this label, as a change of the zero point does.

        Returns what was added where that was possible; None for a format without zero points.
        """
        return None


class IntegerLevels(Levels):
    """Whole numbers from ``low - zero_point`` to ``high - zero_point``."""

    def __init__(self, grid: LabelledGrid, rows: int, scales: str):
        super().__init__(grid.scale.t().expand(-1, rows), grid.scale.shape[0] == 1 and rows > 1)
        self._grid, self._scales = grid, scales
        # Without a zero point, rows of zeros: every column is then clamped by the same operation.
        zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        self.zero = zero.t().expand(-1, rows).clone(memory_format=torch.contiguous_format)
        self._low, self._high = grid.low - self.zero, grid.high - self.zero
        # Views: what changes is written into the tensors that they look at.
        self._views = list(zip(self.scale.unbind(), self._low.unbind(), self._high.unbind(), strict=True))

    def round(self, label: int, column: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Half to even, saturating."""
        scale, low, high = self._views[label]
        torch.div(column, scale, out=out).round_().clamp_(low, high)
        return scale

    def storable(self, scale: torch.Tensor) -> torch.Tensor:
        """In the type that the spec names."""
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return rounded_scales(Grid(scale, None, self._grid.low, self._grid.high), scale, self._scales).scale

    def shift(self, label: int, steps: torch.Tensor) -> torch.Tensor | None:
        """The zero point moves the other way, as far as it stays a code."""
        if self._grid.zero_point is None or self.shared:
            return None
        zero = (self.zero[label] - steps).clamp_(self._grid.low, self._grid.high)
        moved = self.zero[label] - zero
        self.set_zero(label, zero)
        return moved

    def set_zero(self, label: int, zero: torch.Tensor) -> None:
        """Changes the zero points (out,) of a label."""
        self.zero[label] = zero
        self._low[label], self._high[label] = self._grid.low - zero, self._grid.high - zero

    def grid(self) -> LabelledGrid:
        """Returns the grids as they are now."""
        rows = slice(0, 1) if self._grid.scale.shape[0] == 1 else slice(None)
        zero = None if self._grid.zero_point is None else self.zero.t()[rows].contiguous()
        return replace(self._grid, scale=self.scale.t()[rows].contiguous(), zero_point=zero)


@dataclass(frozen=True)
class LevelForm:
    """How a format that is not an integer grid makes values of levels and scales.

    Attributes:
        nearest: gives the level nearest to each value, in float32.
        codes: gives the codes of levels, one a byte or in the format's own type.
        greatest: the greatest level.
        stored_scales: gives the scale tensors that are stored of float32 scales (out, groups), (out, 1) or (1,).
        scales: gives the float32 scales that those stand for, in that shape.
        multipliers: of the absmax scale that are worth a try.
    """

    nearest: Callable[[torch.Tensor], torch.Tensor]
    codes: Callable[[torch.Tensor], torch.Tensor]
    greatest: float
    stored_scales: Callable[[torch.Tensor], Encoded]
    scales: Callable[[Encoded], torch.Tensor]
    multipliers: tuple[float, ...]


FINE = tuple(round(1.5 - 0.02 * i, 2) for i in range(51))
"""Multipliers 1.5 to 0.5: above 1 the greatest weight falls on a lower level, as NVFP4's scale of absmax / 4."""


def level_form(spec: QuantSpec, greatest: torch.Tensor) -> LevelForm:
    """Returns how the format of `spec` makes values.

    Args:
        spec: a format that is not an integer grid.
        greatest: greatest magnitude of the weight, a tensor of one number; NVFP4's scale of the tensor follows from it.

    Raises:
        ValueError: for a format that has no levels and scales alone.
    """
    codec: Codec = codec_of(spec)
    if isinstance(codec, Codebook):
        stored = quantize_scales if spec.double_quant else _as_scale
        read = dequantize_scales if spec.double_quant else _scale_of
        return LevelForm(lambda x: codec.levels(codec.codes(x)), codec.codes, codec.greatest, stored, read, FINE)
    if isinstance(codec, Microscaling):
        top = float(codec.to_values(codec.to_codes(torch.full((1,), 1e30))))
        return LevelForm(
            lambda x: codec.to_values(codec.to_codes(x)),
            codec.to_codes,
            top,
            lambda scale: {"scale": _nearest_e8m0(scale)},
            lambda parts: e8m0_values(parts["scale"]),
            (2.0, 1.0, 0.5),
        )
    if isinstance(codec, Nvfp4):
        scale = tensor_scale(greatest, spec)
        return LevelForm(
            round_e2m1,
            e2m1_codes,
            E2M1_MAX,
            lambda s: {"scale": to_float8(divided(s, scale), SCALE_TYPE), "tensor_scale": scale},
            lambda parts: parts["scale"].float() * parts["tensor_scale"],
            FINE,
        )
    if isinstance(codec, Float8):
        dtype = codec.dtype
        return LevelForm(
            lambda x: to_float8(x, dtype).float(),
            lambda x: to_float8(x, dtype),
            codec.greatest,
            _as_scale,
            _scale_of,
            FINE,
        )
    raise ValueError(f"format: {spec.format!r} has no levels for a solver to choose from: use nf4, mxfp4 or nvfp4")


class FormatLevels(Levels):
    """The levels of a format such as NF4, MXFP4 or FP8, on scales that the format can store.

    Args:
        spec: the format.
        form: what `level_form` gives for it.
        scale: float32 (out, groups), (out, 1) or (1,), as fitted; rounded here to what is stored.
        rows: rows of the weight.
    """

    def __init__(self, spec: QuantSpec, form: LevelForm, scale: torch.Tensor, rows: int):
        self._spec, self._form, self._shape = spec, form, scale.shape
        self._parts = form.stored_scales(scale)
        scale = form.scales(self._parts)
        super().__init__(scale.reshape(-1, scale.shape[-1]).t().expand(-1, rows), scale.numel() == 1 and rows > 1)
        self._divisor, self._changed = _divisors(self.scale), False

    def round(self, label: int, column: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As the codec rounds values over their scale; 0 where the scale is 0."""
        out.copy_(self._form.nearest(column / self._divisor[label]))
        return self.scale[label]

    def storable(self, scale: torch.Tensor) -> torch.Tensor | None:
        """In the format's type of scales. With double quantization a scale cannot be changed alone."""
        return None if self._spec.double_quant else self._form.scales(self._form.stored_scales(scale))

    def set_scale(self, label: int, scale: torch.Tensor) -> None:
        """Changes the scales of a label, and what is stored of them."""
        super().set_scale(label, scale)
        self._divisor[label] = _divisors(scale)
        self._changed = True

    def encoded(self, steps: torch.Tensor) -> Encoded:
        """Returns what the codec stores of levels (out, in) on these scales: ``codec.decode`` gives level times scale."""
        codes, width = self._form.codes(steps.contiguous()), codec_of(self._spec).width
        parts = self._parts
        if self._changed:
            rows = self.scale[:, :1] if self.shared else self.scale
            parts = self._form.stored_scales(rows.t().reshape(self._shape))
        parts = {name: part.contiguous() for name, part in parts.items()}
        return {**parts, "codes": pack(codes, width) if width < 8 else codes}


class KLevels(Levels):
    """Code less middle less the least value in steps, one row's block a label; scales stay as they are.

    Args:
        weight: float32 (out, in).
        codec: of the format.
        weighing: what a squared error in each column weighs, (in,), or a Hessian (in, in), of which the diagonal is taken; None
            weighs all alike.
    """

    def __init__(self, weight: torch.Tensor, codec: KQuant, weighing: torch.Tensor | None):
        diagonal = weighing if weighing is None or weighing.ndim == 1 else weighing.diagonal()
        self._codec, self._scales = codec, fitted(weight, codec.form, diagonal)
        super().__init__(self._scales.steps().t(), shared=False)
        divisor = torch.where(self.scale == 0, torch.full_like(self.scale, torch.inf), self.scale)
        self._divisor, self._zero = divisor, self._scales.leasts().t() / divisor + codec.form.middle

    def round(self, label: int, column: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Half to even, saturating."""
        zero = self._zero[label]
        torch.div(column, self._divisor[label], out=out).add_(zero).round_().clamp_(0, self._codec.form.greatest).sub_(
            zero
        )
        return self.scale[label]

    def storable(self, scale: torch.Tensor) -> torch.Tensor | None:
        """None: a block's scale is a code in its superblock's unit."""
        return None

    def encoded(self, steps: torch.Tensor) -> Encoded:
        """Returns what the codec stores of levels (out, in)."""
        zero = self._zero.t().repeat_interleave(self._codec.form.block, 1)
        codes = (steps + zero).round_().clamp_(0, self._codec.form.greatest).to(torch.uint8)
        return {"codes": pack(codes, self._codec.width), **self._scales.stored()}


def absmax_scale(weight: torch.Tensor, spec: QuantSpec, form: LevelForm) -> torch.Tensor:
    """Returns the scales with which the greatest weight of each row or group falls on the greatest level.

    float32 (out, groups), (out, 1) or (1,). For a power-of-two scale rounded as `quantize.codecs.mx` rounds it.
    """
    groups = grouped(weight, spec)
    greatest = absmax(groups.flatten() if spec.granularity == "tensor" else groups)
    greatest = greatest if spec.granularity != "group" else greatest.squeeze(-1)
    codec = codec_of(spec)
    if isinstance(codec, Microscaling):
        return e8m0_values(e8m0_scale(greatest, codec.emax))
    return greatest / form.greatest


def _as_scale(scale: torch.Tensor) -> Encoded:
    return {"scale": scale}


def _scale_of(parts: Encoded) -> torch.Tensor:
    return parts["scale"]


def _nearest_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Returns the E8M0 codes of the powers of two nearest to `scale`, by ratio."""
    mantissa, exponent = torch.frexp(scale)
    code = exponent - 1 + (mantissa > math.sqrt(0.5)).int() + BIAS
    return torch.where(scale > 0, code, torch.zeros_like(code)).clamp_(0, 254).to(torch.uint8)


def _divisors(scale: torch.Tensor) -> torch.Tensor:
    """Returns what to divide by: inf, and so 0 for a level, where a scale is 0 or below float32's normal numbers."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.full_like(scale, torch.inf), scale)
