"""The quantized Linear: integer codes and scales, simulated in floating point."""

import weakref

import torch
from torch import nn
from torch.nn import functional

from quantize.affine import Grid, dequantize, fake_quantize, grouped, quantize
from quantize.ranges import dynamic_grid, static_grid, weight_grid
from quantize.spec import QuantSpec


class InputQuantizer(nn.Module):
    """Quantizes an activation (..., channels), and remembers the last one: Linears that read the same tensor share it.

    Args:
        spec: the number format.
        ranges: per-channel (min, max) from statistics, each (channels,); only with a static spec.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(self, spec: QuantSpec, ranges: tuple[torch.Tensor, torch.Tensor] | None = None):
        super().__init__()
        if not spec.dynamic and ranges is None:
            raise ValueError(f"dynamic: {spec.dynamic} needs ranges from statistics")
        self.spec = spec
        self._low, self._high = 0, 0
        if not spec.dynamic and ranges is not None:
            grid = static_grid(*ranges, spec)
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
            self._low, self._high = grid.low, grid.high
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` rounded to its grid, in the type of `x`."""
        if self._last is not None:
            reference, version, result = self._last
            if reference() is x and version == x._version:
                return result
        result = self._quantize(x)
        # The result goes when the input does: nothing is kept alive beyond the Linears that share it.
        self._last = (weakref.ref(x, self._forget), x._version, result)
        return result

    def _forget(self, reference: object) -> None:
        self._last = None

    def _quantize(self, x: torch.Tensor) -> torch.Tensor:
        if not self.spec.dynamic:
            return fake_quantize(x, Grid(self.scale, self.zero_point, self._low, self._high))
        return fake_quantize_dynamic(x, self.spec)

    def __getstate__(self) -> dict[str, object]:
        """A copy starts without the remembered tensor: weak references cannot be copied."""
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        """Names the format."""
        return f"{self.spec}"


def fake_quantize_dynamic(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns the activation `x` (..., channels) rounded to a grid fitted to its own values."""
    return fake_quantize(grouped(x, spec), dynamic_grid(x, spec)).reshape(x.shape)


class QuantLinear(nn.Module):
    """A Linear whose weight is integer codes, whose input and output are rounded to their grids; simulated.

    `codes` and `scale` (and `zero_point`) are what is stored; the dequantized weight beside them, in the compute dtype,
    is what the simulation multiplies by and is not saved.

    Args:
        weight: (out, in), floating point.
        bias: (out,) or None.
        weight_spec: format of the weight; None leaves it in floating point.
        inputs: quantizer of the input, shared by the Linears that read the same tensor; None leaves it alone.
        output_spec: format of the output (query, key or value); dynamic.
        grid: the weight's grid when a solver has chosen it; otherwise fitted to the weight.
        codes: the weight's codes when a solver has chosen them, (out, in); otherwise nearest.

    Raises:
        ValueError: for NaN or inf in the weight, or a group size that does not divide its columns.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    codes: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_spec: QuantSpec | None,
        inputs: InputQuantizer | None = None,
        output_spec: QuantSpec | None = None,
        grid: Grid | None = None,
        codes: torch.Tensor | None = None,
    ):
        super().__init__()
        weight = weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError("the weight holds NaN or inf")
        self.out_features, self.in_features = weight.shape
        self.weight_spec, self.inputs, self.output_spec = weight_spec, inputs, output_spec
        if weight_spec is None:
            self.register_buffer("weight", weight.clone())
        else:
            grid = grid or weight_grid(weight, weight_spec)
            values = grouped(weight, weight_spec)
            kept = quantize(values, grid) if codes is None else codes.view(values.shape)
            self.register_buffer("codes", kept.view(weight.shape))
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
            self.register_buffer("weight", dequantize(kept, grid, weight.dtype).view(weight.shape), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def input_spec(self) -> QuantSpec | None:
        """Format of the input, or None."""
        return None if self.inputs is None else self.inputs.spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the quantized Linear's output (..., out) for `x` (..., in)."""
        if self.inputs is not None:
            x = self.inputs(x)
        y = functional.linear(x, self.weight, self.bias)
        return y if self.output_spec is None else fake_quantize_dynamic(y, self.output_spec)

    def stored_bytes(self) -> int:
        """Returns the bytes of the weight as it would be stored: codes packed at their bits, scales and zero points.

        Scales count as 4 bytes (float32), zero points as many bits as a code. An unquantized weight counts as 2 bytes a value.
        """
        if self.weight_spec is None:
            return 2 * self.weight.numel()
        bits = self.weight_spec.bits * self.codes.numel() + 32 * self.scale.numel()
        if self.zero_point is not None:
            bits += self.weight_spec.bits * self.zero_point.numel()
        return -(-bits // 8)

    def bits_per_weight(self) -> float:
        """Returns stored bits over weights, scales and zero points included."""
        return 8 * self.stored_bytes() / self.weight.numel()

    def extra_repr(self) -> str:
        """Names the shape and the formats."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.weight_spec}"
