"""A transform as somebody outside would write it: an online Hadamard transform before each MLP's last Linear."""

from dataclasses import dataclass

import torch
from torch import nn

from ptq.network.network import weight_of
from ptq.steps import INPUT, Transform
from quantize.modules.online import OnlineShared, attach_input


@dataclass(frozen=True)
class Options:
    """Which Linears.

    Attributes:
        suffix: the last part of their names.
    """

    suffix: str = "down_proj"


class BlockHadamard(nn.Module):
    """Multiplies blocks of 2^k channels by the orthonormal Hadamard matrix."""

    def __init__(self, channels):
        super().__init__()
        size = channels & -channels
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        self.register_buffer("matrix", matrix / size**0.5)

    def forward(self, x):
        return (x.unflatten(-1, (-1, len(self.matrix))) @ self.matrix.to(x.dtype)).flatten(-2)


class Step(Transform):
    """Puts the transform before the Linear, and its inverse, which is itself, into the Linear's columns."""

    acts = frozenset({INPUT})

    def apply(self, block, plan, context):
        for name in block.linears:
            if name.endswith(self.options.suffix):
                linear = context.module(name)
                weight = weight_of(linear)
                transform = BlockHadamard(weight.shape[1]).to(weight.device)
                weight.copy_(transform(weight))
                attach_input(linear, OnlineShared(transform))
