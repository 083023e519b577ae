"""Linears whose quantized weight is being learned: gradients pass through the rounding of weight and input (`LearnedLinear`), or
its codes stand still and its scales are tuned (`TunedLinear`; EfficientQAT, Chen et al. 2024, section 3.3), those of its input too
(`TunedInput`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, grouped
from quantize.grid.scales import rounded_scales
from quantize.kernels.matmul import linear, product
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.solvers.rounding import LearnedWeight, valued
from quantize.spec.quant_spec import QuantSpec


class LearnedLinear(nn.Module):
    """Computes with what a `LearnedWeight` stands for now; its input is rounded as it will be.

    Args:
        learned: gives the weight (out, in).
        bias: (out,) or None; not trained.
        inputs: quantizer of the input, or None.
        log_scale: logarithm of what the input is divided by, (in,), a parameter that readers of one tensor share; the weight
            that `learned` gives is one for the input so divided. None divides by nothing.
        dtype: type of the products, forward and backward; None for the input's.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        learned: LearnedWeight,
        bias: torch.Tensor | None,
        inputs: InputQuantizer | None = None,
        log_scale: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.learned, self.inputs, self.log_scale, self.dtype = learned, inputs, log_scale, dtype
        self.held: torch.Tensor | None = None
        """What `learned` gives, where it is held."""
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output (..., out) for `x` (..., in), in the type of `x`."""
        if self.log_scale is not None:
            x = x * torch.exp(-self.log_scale).to(x.dtype)
        if self.inputs is not None:
            x = valued(x, self.inputs(x.detach()))
        weight = self.learned() if self.held is None else self.held
        return product_in(self.dtype or x.dtype, x, weight, self.bias)


class HeldWeights:
    """Weights that Linears learn, made once for several passes.

    Attributes:
        leaves: them, (out, in) each, float32: what the passes take gradients by.
    """

    def __init__(self, linears: Sequence[LearnedLinear]):
        self._linears = list(linears)
        with torch.no_grad():
            self.leaves = [module.learned() for module in linears]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def backward(self) -> None:
        """Carries the leaves' gradients on to the parameters that the weights are made of, and drops them.

        A weight at a time, which is made again for it: what is kept for the derivatives of all of them would take several times
        their memory.
        """
        for module, leaf in zip(self._linears, self.leaves, strict=True):
            if leaf.grad is not None:
                with torch.enable_grad():
                    module.learned().backward(leaf.grad)
                leaf.grad = None


@contextmanager
def weights_held(linears: Sequence[LearnedLinear]) -> Iterator[HeldWeights]:
    """Inside the context the Linears' weights are made once, and their passes take gradients by these."""
    held = HeldWeights(linears)
    for module, leaf in zip(linears, held.leaves, strict=True):
        module.held = leaf
    try:
        yield held
    finally:
        for module in linears:
            module.held = None


class TunedInput(nn.Module):
    """Rounds as a static `InputQuantizer` does, with each scale times exp of a parameter that has the derivative of learned step sizes
    (Esser et al. 2020, equation 3): what lies within the range passes its own gradient, what is clipped moves the range alone.

    Args:
        inputs: the quantizer, which is left as it is.

    Raises:
        ValueError: for one without static scales of integers.
    """

    start: torch.Tensor
    zero_point: torch.Tensor | None
    labels: torch.Tensor | None

    def __init__(self, inputs: InputQuantizer):
        super().__init__()
        if inputs.spec.dynamic or not inputs.spec.affine:
            raise ValueError(f"{inputs.spec}: has no static scales of integers to tune")
        self.limits = inputs.limits
        self.register_buffer("start", inputs.scale.detach().clone())
        self.register_buffer("zero_point", inputs.zero_point)
        self.register_buffer("labels", inputs.labels)
        self.log_ratio = nn.Parameter(torch.zeros_like(self.start))

    def scale(self) -> torch.Tensor:
        """Returns the scales in the shape of the quantizer's, differentiable."""
        return self.start * torch.exp(self.log_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` (..., channels) rounded, in its type."""
        grid = Grid(self.scale(), self.zero_point, *self.limits)
        grid = grid if self.labels is None else grid.of_channels(self.labels)
        steps = x.float() / grid.scale
        codes = valued(steps, steps.detach().round())
        if grid.zero_point is None:
            codes = codes.clamp(grid.low, grid.high)
        else:
            codes = (codes + grid.zero_point).clamp(grid.low, grid.high) - grid.zero_point
        return (codes * grid.scale).to(x.dtype)


class TunedLinear(nn.Module):
    """Computes what a `QuantLinear` does with each scale times exp of a parameter, straight through the rounding of its input.

    Steps of an optimizer are relative to a scale's own size that way, and no scale changes its sign.

    Args:
        quantized: its weight has an integer format, or another one that is proportional to its scales; it is left as it is.
        dtype: type of the products, forward and backward.
        inputs: rounds the input in place of its quantizer; readers of one tensor share it. None for the quantizer.

    Raises:
        ValueError: for a weight of another format, or one that a product of low rank is added to.
    """

    bias: torch.Tensor | None
    labels: torch.Tensor | None
    steps: torch.Tensor
    start: torch.Tensor

    def __init__(self, quantized: QuantLinear, dtype: torch.dtype = torch.float32, inputs: TunedInput | None = None):
        super().__init__()
        spec = quantized.weight_spec
        if spec is None or not codec_of(spec).proportional:
            raise ValueError(f"format: {spec.format if spec else 'floating point'} has no scales to tune: use int")
        if quantized.corrected:
            raise ValueError("a product of low rank is added to the weight, which was fitted to its scales")
        self.spec, self.shape, self.dtype = spec, quantized.weight.shape, dtype
        self.inputs = quantized.inputs if inputs is None else inputs
        self.register_buffer("labels", quantized.labels)
        self.register_buffer("steps", _steps(quantized, spec))
        self.register_buffer("start", quantized.scale.detach().clone())
        self.register_buffer("bias", quantized.bias)
        self.log_ratio = nn.Parameter(torch.zeros_like(self.start))

    def scale(self) -> torch.Tensor:
        """Returns the scales in the shape of the `QuantLinear`'s, as they would be stored, differentiable."""
        exact = self.start * torch.exp(self.log_ratio)
        now = exact.detach()
        return valued(exact, rounded_scales(Grid(now, None, 0, 2**self.spec.bits - 1), now, self.spec.scales).scale)

    def weight(self) -> torch.Tensor:
        """Returns the weight (out, in), float32, differentiable."""
        scale = self.scale()
        return (self.steps * (scale if self.labels is None else scale[..., self.labels])).reshape(self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output (..., out) for `x` (..., in), in the type of `x`."""
        if isinstance(self.inputs, TunedInput):
            x = self.inputs(x)
        elif self.inputs is not None:
            x = valued(x, self.inputs(x.detach()))
        return product_in(self.dtype, x, self.weight(), self.bias)


def _steps(quantized: QuantLinear, spec: QuantSpec) -> torch.Tensor:
    """Returns what the scales are multiplied by, in the weight's `grouped` shape."""
    if not spec.affine:
        stored = {name: getattr(quantized, name) for name in quantized.stored_names}
        stored["scale"] = torch.ones_like(quantized.scale)
        return grouped(codec_of(spec).decode(stored, spec, quantized.weight.shape), spec)
    codes, zero, labels = grouped(quantized.codes, spec).to(torch.int16), quantized.zero_point, quantized.labels
    if zero is not None:
        codes -= (zero if labels is None else zero[..., labels]).to(torch.int16)
    # Whole numbers up to 255 are exact in 16 bits of either kind.
    return codes.to(torch.bfloat16)


class TunedGain(nn.Module):
    """Gives a norm's weight with its gain times exp of a parameter.

    Args:
        weight: of the norm, (channels,).
        offset: what the norm adds to it to get its gain: 0 or 1.
    """

    def __init__(self, weight: torch.Tensor, offset: float):
        super().__init__()
        self.offset = offset
        self.log_ratio = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight (channels,), in its type, differentiable."""
        return (weight + (weight + self.offset) * torch.expm1(self.log_ratio)).to(weight.dtype)


def product_in(
    dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x W^T + b (..., out) in the type of `x`, multiplied in `dtype`, and so are its derivatives by `x` and `weight`."""
    y: torch.Tensor = _Product.apply(x, weight, dtype)
    return y if bias is None else y + bias.to(y.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        narrow, matrix = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(narrow, matrix)
        ctx.types = x.dtype, weight.dtype
        return linear(narrow, matrix).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_output = gradients[0].to(weight.dtype).reshape(-1, len(weight)).contiguous()
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = product(by_output, weight).to(ctx.types[0]).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            by_weight = product(by_output.t().contiguous(), x.reshape(-1, x.shape[-1])).to(ctx.types[1])
        return by_x, by_weight, None
