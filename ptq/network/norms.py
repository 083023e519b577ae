"""How a norm uses its gain, found by trying it: ``w`` as LayerNorm and LLaMA's RMSNorm do, or ``1 + w`` as Gemma's does."""

import torch
from torch import nn

from ptq.network.precise import precise_module


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float | None:
    """Returns 0.0 for a norm that multiplies by its ``weight``, 1.0 for one that multiplies by ``1 + weight``.

    None for anything else: its gain cannot be rescaled. The norm's weight is put back as it was.
    """
    with precise_module(norm):
        weight, bias = _tensor(norm, "weight"), _tensor(norm, "bias")
        if weight is None or weight.dim() != 1:
            return None
        x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device).view(1, 1, -1)
        shift = 0.0 if bias is None else bias
        kept = weight.clone()
        try:
            weight.fill_(0)
            at_zero = norm(x) - shift
            weight.fill_(1)
            at_one = norm(x) - shift
        finally:
            weight.copy_(kept)
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * (at_one - at_zero), rtol=1e-2, atol=1e-4):
            return offset
    return None


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, torch.Tensor) else None


@torch.no_grad()
def is_centring(norm: nn.Module) -> bool:
    """Returns whether the norm takes the mean over the channels out, as LayerNorm does and RMSNorm does not."""
    with precise_module(norm):
        weight = _tensor(norm, "weight")
        width = int(getattr(norm, "normalized_shape", [0])[0]) if weight is None else len(weight)
        dtype, device = (torch.float32, None) if weight is None else (weight.dtype, weight.device)
        x = torch.linspace(-1, 2, width, dtype=dtype, device=device).view(1, 1, -1)
        return bool(torch.allclose(norm(x + 3), norm(x), rtol=1e-3, atol=1e-4))
