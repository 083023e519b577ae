"""The quantized Linear: integer codes and scales, simulated in floating point, or multiplied by an integer kernel."""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from quantize.checks import all_finite
from quantize.codecs.base import Encoded, keep_dtypes, stored_bytes
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, dequantize, fake_quantize, grouped, integer_range, quantize
from quantize.grid.ranges import static_grid, weight_grid
from quantize.kernels.base import IntegerRows, integer_rows, integer_weight
from quantize.kernels.choice import Choice, Multiplier
from quantize.kernels.matmul import linear
from quantize.spec.quant_spec import QuantSpec

GRID = ("scale", "zero_point")
"""The buffers of an integer grid."""


class InputQuantizer(nn.Module):
    """Quantizes an activation (..., channels), and remembers the last one: Linears that read the same tensor share it.

    Args:
        spec: the number format.
        ranges: per-channel (min, max) from statistics, each (channels,); only with a static spec.
        labels: cluster of each channel, int64 (channels,); only with granularity cluster.
        grid: the static grid itself, where it was fitted to what was seen (`quantize.grid.ranges.observed_grid`).
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    labels: torch.Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        ranges: tuple[torch.Tensor, torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        grid: Grid | None = None,
    ):
        super().__init__()
        spec.check_activation()
        if not spec.dynamic and ranges is None and grid is None:
            raise ValueError(f"dynamic: {spec.dynamic} needs ranges from statistics")
        self.spec = spec
        self._low, self._high = 0, 0
        self.register_buffer("labels", labels if spec.granularity == "cluster" else None)
        if not spec.dynamic and ranges is not None:
            # A float has no codes on a grid: its one scale stands where a grid's does.
            grid = (
                static_grid(*ranges, spec, labels)
                if spec.affine
                else Grid(codec_of(spec).static_scale(*ranges), None, 0, 0)
            )
        if grid is not None:
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
            self._low, self._high = grid.low, grid.high
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None
        self._last_integers: tuple[weakref.ref[torch.Tensor], int, IntegerRows] | None = None

    @classmethod
    def from_stored(
        cls,
        spec: QuantSpec,
        low: int,
        high: int,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Self:
        """Returns the quantizer whose `spec`, `limits` and buffers these are."""
        return cls(spec, None, labels, None if scale is None else Grid(scale, zero_point, low, high))

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest code of a static grid; (0, 0) where ranges are dynamic."""
        return self._low, self._high

    @property
    def grid(self) -> Grid:
        """The static grid, one point set a tensor, channel or cluster; of a float its scale alone."""
        return Grid(self.scale, self.zero_point, self._low, self._high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` rounded to its grid, in the type of `x`."""
        if x.is_inference():
            # Tensors of inference mode count no versions: a change in place could not be told from the same values.
            return self._quantize(x)
        if self._last is not None:
            reference, version, result = self._last
            if reference() is x and version == x._version:
                return result
        result = self._quantize(x)
        # The result goes when the input does: nothing is kept alive beyond the Linears that share it.
        self._last = (weakref.ref(x, self._forget), x._version, result)
        return result

    def rescale(self, scale: torch.Tensor) -> None:
        """Gives the static grid another scale, of the shape of the old one.

        Raises:
            ValueError: for another shape, NaN or inf, or a quantizer without static scales.
        """
        if self.spec.dynamic or scale.shape != self.scale.shape or not all_finite(scale):
            raise ValueError(f"scale: {tuple(scale.shape)} is no finite scale of {self.spec}")
        self.scale = scale.to(self.scale)
        self._forget(self)

    def integers(self, x: torch.Tensor) -> IntegerRows:
        """Returns `x` (..., channels) as integer kernels take it: codes of what `forward` gives, remembered likewise."""
        grid = None if self.spec.dynamic else self.grid
        if x.is_inference():
            return integer_rows(x, self.spec, grid)
        if self._last_integers is not None:
            reference, version, result = self._last_integers
            if reference() is x and version == x._version:
                return result
        result = integer_rows(x, self.spec, grid)
        self._last_integers = (weakref.ref(x, self._forget), x._version, result)
        return result

    def _forget(self, reference: object) -> None:
        self._last = self._last_integers = None

    def _quantize(self, x: torch.Tensor) -> torch.Tensor:
        if not self.spec.dynamic:
            if not self.spec.affine:
                return codec_of(self.spec).fake_static(x, self.scale, self.spec)
            grid = self.grid
            return fake_quantize(x, grid if self.labels is None else grid.of_channels(self.labels))
        return fake_quantize_dynamic(x, self.spec)

    def __getstate__(self) -> dict[str, object]:
        """A copy starts without the remembered tensor: weak references cannot be copied."""
        return {**self.__dict__, "_last": None, "_last_integers": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        return keep_dtypes(self, GRID, lambda: super(InputQuantizer, self)._apply(fn, recurse))

    def extra_repr(self) -> str:
        """Names the format."""
        return f"{self.spec}"


def fake_quantize_dynamic(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns the activation `x` (..., channels) rounded to the format, with scales fitted to its own values.

    What is fitted to more than a token is fitted to a sample: with three dimensions or more the first one is the batch, and
    no sample of it sees another. Two are the tokens and channels of one sample, also where an expert's tokens come from many.
    """
    codec = codec_of(spec)
    if not x.numel():
        return x
    if x.dim() > 2 and len(x) > 1 and codec.couples_tokens(spec):
        return torch.stack([codec.fake(sample, spec) for sample in x])
    return codec.fake(x, spec)


class QuantLinear(nn.Module):
    """A Linear whose weight is codes and whose input is rounded to its format; simulated.

    Codes and scales are what is stored, in buffers: `codes`, `scale` (and `zero_point`) for integers, one code a byte, what
    `Codec.encode` gives for other formats. The dequantized weight beside them, in the compute dtype, is what the simulation
    multiplies by and is not saved.

    Args:
        weight: (out, in), floating point.
        bias: (out,) or None.
        weight_spec: format of the weight; None leaves it in floating point.
        inputs: quantizer of the input, shared by the Linears that read the same tensor; None leaves it alone.
        grid: the weight's grid when a solver has chosen it; otherwise fitted to the weight.
        codes: the weight's codes when a solver has chosen them, (out, in); otherwise nearest.
        labels: cluster of each input channel, int64 (in,); only with a weight of granularity cluster.
        stored: what is stored of the weight when a solver has chosen it, for a format that is not integer.

    Raises:
        ValueError: for NaN or inf in the weight, a format that weights cannot have, a group size that does not divide its
            columns, codes of another shape or outside the format's range, or codes for a format that is not integer.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    codes: torch.Tensor
    left: torch.Tensor | None
    right: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_spec: QuantSpec | None,
        inputs: InputQuantizer | None = None,
        grid: Grid | None = None,
        codes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        stored: Encoded | None = None,
    ):
        super().__init__()
        weight = weight.detach()
        if not all_finite(weight):
            raise ValueError("the weight holds NaN or inf")
        self.out_features, self.in_features = weight.shape
        # Statistics, labels and solutions out of a file are on the CPU.
        self.weight_spec, self.inputs = weight_spec, None if inputs is None else inputs.to(weight.device)
        clustered = weight_spec is not None and weight_spec.granularity == "cluster"
        self.register_buffer("labels", labels.to(weight.device) if clustered and labels is not None else None)
        self.left = self.right = None
        self._multiplier: Multiplier | None = None
        self._names: tuple[str, ...] = ()
        if weight_spec is None:
            self.register_buffer("weight", weight.clone())
        elif not weight_spec.affine:
            weight_spec.check_weight()
            if grid is not None or codes is not None:
                raise ValueError(
                    f"format: {weight_spec.format!r} has no grid that a solver could choose codes on: use int"
                )
            if stored is None:
                stored = codec_of(weight_spec).encode(weight, weight_spec)
            elif (found := {n: (tuple(t.shape), t.dtype) for n, t in stored.items()}) != (
                expected := codec_of(weight_spec).layout(tuple(weight.shape), weight_spec)
            ):
                raise ValueError(f"stored: {found} is not what {weight_spec.format} stores of this weight: {expected}")
            self._names = tuple(stored)
            for name, tensor in stored.items():
                self.register_buffer(name, tensor)
            self.register_buffer("weight", self._decoded(weight.dtype), persistent=False)
        else:
            if stored is not None:
                raise ValueError(f"stored: {weight_spec.format!r} takes codes and a grid instead")
            self._names = GRID
            grid = weight_grid(weight, weight_spec, self.labels) if grid is None else grid.to(weight.device)
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
            if codes is None:
                codes = quantize(grouped(weight, weight_spec), self._grid).reshape(weight.shape)
            self.register_buffer("codes", _checked(codes.to(weight.device), weight.shape, grid).contiguous())
            self.register_buffer("weight", self._decoded(weight.dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        grid: Grid,
        bias: torch.Tensor | None,
        weight_spec: QuantSpec,
        inputs: InputQuantizer | None = None,
        dtype: torch.dtype = torch.float32,
        labels: torch.Tensor | None = None,
    ) -> Self:
        """Returns the module for codes (out, in) that a solver has chosen on `grid`; `dtype` is the compute type."""
        shape = torch.zeros((), dtype=dtype, device=codes.device).expand(codes.shape)
        return cls(shape, bias, weight_spec, inputs, grid, codes, labels)

    @classmethod
    def from_stored(
        cls,
        stored: Encoded,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        weight_spec: QuantSpec,
        inputs: InputQuantizer | None = None,
        dtype: torch.dtype = torch.float32,
        labels: torch.Tensor | None = None,
    ) -> Self:
        """Returns the module of a weight of `shape` (out, in) whose buffers `stored` (by name), `bias` and `labels` were;
        `dtype` is the compute type.
        """
        if weight_spec.affine:
            limits = integer_range(weight_spec.bits, weight_spec.symmetric, weight_spec.full_range)
            grid = Grid(stored["scale"], stored.get("zero_point"), *limits)
            return cls.from_codes(stored["codes"], grid, bias, weight_spec, inputs, dtype, labels)
        empty = torch.zeros((), dtype=dtype, device=stored["codes"].device).expand(shape)
        return cls(empty, bias, weight_spec, inputs, stored=stored)

    def correct(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds left (out, r) times right (r, in) to the weight that the codes stand for; both are stored as they are.

        Raises:
            ValueError: for shapes that do not fit, a weight in floating point, or one that is corrected already.
        """
        if left.shape != (self.out_features, right.shape[0]) or right.shape[1] != self.in_features:
            shapes = f"{tuple(left.shape)}, {tuple(right.shape)}"
            raise ValueError(f"left, right: shapes {shapes} do not make {(self.out_features, self.in_features)}")
        if self.weight_spec is None or self.corrected:
            raise ValueError("left, right: only a quantized weight is corrected, and once")
        del self.left, self.right
        self.register_buffer("left", left.to(self.weight.device))
        self.register_buffer("right", right.to(self.weight.device))
        self.weight = self._decoded(self.weight.dtype)

    def rescale(self, scale: torch.Tensor) -> None:
        """Gives the codes another scale, of the shape of the old one.

        Raises:
            ValueError: for another shape, NaN or inf, or a weight whose format is not proportional to its scales.
        """
        if self.weight_spec is None or not codec_of(self.weight_spec).proportional or scale.shape != self.scale.shape:
            raise ValueError(f"scale: {tuple(scale.shape)} is not the shape of a scale that could be changed here")
        if not all_finite(scale):
            raise ValueError("scale: holds NaN or inf")
        self.scale = scale.to(self.scale)
        self.weight = self._decoded(self.weight.dtype)
        if self._multiplier is not None:
            self._multiplier.forget()

    def rescale_input(self, scale: torch.Tensor) -> None:
        """Gives the static quantizer of the input another scale, to all Linears that share it. See `InputQuantizer.rescale`."""
        if self.inputs is None:
            raise ValueError("the input is not quantized")
        self.inputs.rescale(scale)
        if self._multiplier is not None:
            self._multiplier.forget()

    @property
    def corrected(self) -> bool:
        """Whether a product of low rank is added to the weight."""
        return self.left is not None

    @property
    def _grid(self) -> Grid:
        """The weight's grid, as it broadcasts to the weight in its `grouped` shape."""
        spec = self.weight_spec
        if spec is None or not spec.affine:
            raise ValueError(f"the weight's format, {spec.format if spec else 'floating point'}, has no integer grid")
        grid = Grid(self.scale, self.zero_point, *integer_range(spec.bits, spec.symmetric, spec.full_range))
        return grid if self.labels is None else grid.of_channels(self.labels)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the buffers that hold the encoded weight, labels left out; none where it is in floating point."""
        return (*self._names, "codes") if self.weight_spec is not None and self.weight_spec.affine else self._names

    @property
    def _stored(self) -> Encoded:
        """The buffers that hold an encoded weight."""
        return {name: getattr(self, name) for name in self._names}

    def _decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight (out, in) that the codes stand for."""
        if self.weight_spec is None:
            return self.weight
        if not self.weight_spec.affine:
            shape = (self.out_features, self.in_features)
            weight = codec_of(self.weight_spec).decode(self._stored, self.weight_spec, shape, dtype)
        else:
            weight = dequantize(grouped(self.codes, self.weight_spec), self._grid, dtype).reshape(self.codes.shape)
        if self.left is None or self.right is None:
            return weight
        return (weight.float() + self.left.float() @ self.right.float()).to(dtype)

    def use_kernels(self, choice: Choice) -> None:
        """Lets integer kernels multiply from now on, where `choice` has one that can; else it stays simulated."""
        if self.corrected:
            choice.refuse("a low-rank correction is added in floating point")
            self._multiplier = None
            return
        shape = (self.out_features, self.in_features)
        self._multiplier = choice.multiplier(self.weight_spec, self.input_spec, shape, self.weight.device)

    @property
    def integer(self) -> bool:
        """Whether an integer kernel multiplies."""
        return self._multiplier is not None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if self._multiplier is not None:
            self._multiplier.forget()
        names = (*self._names, "left", "right") if self.corrected else self._names
        return keep_dtypes(self, names, lambda: super(QuantLinear, self)._apply(fn, recurse))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.weight_spec is not None:
            # The weight is not saved: without this the module would go on multiplying by its old one.
            self.weight = self._decoded(self.weight.dtype)
        if self._multiplier is not None:
            self._multiplier.forget()

    @property
    def bits(self) -> int | None:
        """Bits of a weight's code, scales not counted, or None where the weight is left in floating point."""
        return None if self.weight_spec is None else self.weight_spec.bits

    @property
    def input_spec(self) -> QuantSpec | None:
        """Format of the input, or None."""
        return None if self.inputs is None else self.inputs.spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the quantized Linear's output (..., out) for `x` (..., in)."""
        if self._multiplier is not None and self.inputs is not None:
            if not self._multiplier.ready:
                self._multiplier.take(integer_weight(self.codes, self._grid))
            y = self._multiplier(self.inputs.integers(x), self.bias, x.dtype)
            return y.view(*x.shape[:-1], self.out_features)
        if self.inputs is not None:
            x = self.inputs(x)
        return linear(x, self.weight, self.bias)

    def stored_bytes(self) -> int:
        """Returns the bytes of the weight as it is stored: codes packed at their bits, what they are scaled by and corrected by.

        Integers are held here one a byte and counted as packed: scales count as 4 bytes (2 in fp16), zero points as many
        bits as a code, labels 2 bytes. An unquantized weight counts as 2 bytes a value.
        """
        if self.weight_spec is None:
            return 2 * self.weight.numel()
        return self._code_bytes() + sum(t.numel() * t.element_size() for t in (self.left, self.right) if t is not None)

    def _code_bytes(self) -> int:
        if self.weight_spec is None:
            return 0
        if not self.weight_spec.affine:
            return stored_bytes(self._stored)
        scale_bits = 32 if self.weight_spec.scales == "float32" else 16
        bits = self.weight_spec.bits * self.codes.numel() + scale_bits * self.scale.numel()
        if self.zero_point is not None:
            bits += self.weight_spec.bits * self.zero_point.numel()
        if self.labels is not None:
            bits += 16 * self.labels.numel()
        return -(-bits // 8)

    def bits_per_weight(self) -> float:
        """Returns stored bits over weights, scales and zero points included."""
        return 8 * self.stored_bytes() / self.weight.numel()

    def extra_repr(self) -> str:
        """Names the shape and the formats."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, weight={self.weight_spec}"


def _checked(codes: torch.Tensor, shape: torch.Size, grid: Grid) -> torch.Tensor:
    """Returns `codes` in the type that `quantize` gives; ValueError for another shape or values outside the grid."""
    if codes.shape != shape:
        raise ValueError(f"codes: shape {tuple(codes.shape)} is not the weight's {tuple(shape)}")
    if codes.numel() and (codes.min() < grid.low or codes.max() > grid.high):
        raise ValueError(f"codes: values lie outside {grid.low} .. {grid.high}")
    return codes.to(torch.int8 if grid.low < 0 else torch.uint8)
