"""A weight that is decoded for who reads it, and the product with it under autograd."""

from typing import Any

import torch


class DecodedWeight(torch.Tensor):
    """A weight decoded for someone who reads it: its ``data`` cannot be had, because what is written into it, such as an
    adapter that is merged, would be lost without a word.
    """

    # What is computed from it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the weight is quantized and cannot be written: use ptq.integrations.replace.dequantize_ before merging"
        )

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise ValueError(
            "the weight is quantized and cannot be written: use ptq.integrations.replace.dequantize_ before merging"
        )


class FrozenProduct(torch.autograd.Function):
    """The product with a frozen weight. What is saved for backward are the codes: saving the decoded weight, as autograd
    would, holds a dequantized model in memory for the time of a training step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: Any, *stored: torch.Tensor
    ) -> torch.Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*stored)
        return module._product(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grads
        module: Any = ctx.module
        # The saved tensors and not the module's: offloading may have taken those away since.
        stored = dict(zip(module.stored_names, ctx.saved_tensors, strict=True))
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ module._decoded(stored, grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, module.out_features).sum(0).to(ctx.bias_dtype)
        return to_x, to_bias, None, *(None for _ in stored)
