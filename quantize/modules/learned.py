"""A Linear whose quantized weight is being learned: gradients pass through the rounding of weight and input."""

import torch
from torch import nn
from torch.nn import functional

from quantize.modules.simulated import InputQuantizer
from quantize.solvers.rounding import LearnedWeight, valued


class LearnedLinear(nn.Module):
    """Computes with what a `LearnedWeight` stands for now; its input is rounded as it will be.

    Args:
        learned: gives the weight (out, in).
        bias: (out,) or None; not trained.
        inputs: quantizer of the input, or None.
        log_scale: logarithm of what the input is divided by, (in,), a parameter that readers of one tensor share; the weight
            that `learned` gives is one for the input so divided. None divides by nothing.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        learned: LearnedWeight,
        bias: torch.Tensor | None,
        inputs: InputQuantizer | None = None,
        log_scale: nn.Parameter | None = None,
    ):
        super().__init__()
        self.learned, self.inputs, self.log_scale = learned, inputs, log_scale
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output (..., out) for `x` (..., in), in the type of `x`."""
        if self.log_scale is not None:
            x = x * torch.exp(-self.log_scale).to(x.dtype)
        if self.inputs is not None:
            x = valued(x, self.inputs(x.detach()))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.learned().to(x.dtype), bias)
