"""A norm whose channels are written in another order (RPTQ, Yuan et al. 2023, section 4.2)."""

import torch
from torch import nn


class Reordered(nn.Module):
    """A norm that writes its channels in another order."""

    order: torch.Tensor

    def __init__(self, inner: nn.Module, order: torch.Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the norm gives for `x` (..., channels), gathered."""
        y: torch.Tensor = self.inner(x).index_select(-1, self.order)
        return y
