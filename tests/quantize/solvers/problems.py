"""Shared by the tests of solvers: small weights with correlated inputs, and losses in float64."""

import itertools

import numpy as np
import torch

from quantize.solvers.gptq import Hessian


def problem(rows=12, columns=32, tokens=200, seed=0):
    """A weight, and the Hessian of inputs whose channels are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    x = (torch.randn(tokens, columns, generator=generator) @ mix) * torch.rand(columns, generator=generator).add(0.2)
    hessian = Hessian(columns)
    hessian.update(x)
    return torch.randn(rows, columns, generator=generator), hessian.matrix


def losses(weight, quantized, hessian):
    """D H D^T of each row, in float64."""
    d = (weight.double() - quantized.double()).numpy()
    return np.einsum("ri,ij,rj->r", d, hessian.double().numpy(), d)


def best_of_all(row, scale, levels, hessian):
    """The least D H D^T over every choice of levels for a row, in float64, on fixed scales (one number a column)."""
    row, scale, h = (np.asarray(t, dtype=np.float64) for t in (row, scale, hessian))
    choices = np.array(list(itertools.product(levels, repeat=len(row))), dtype=np.float64)
    d = row - choices * scale
    return np.einsum("ci,ij,cj->c", d, h, d).min()
