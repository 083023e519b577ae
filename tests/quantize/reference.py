"""Shared by the tests of formats: what a format costs on N(0, 1), against a reference in float64."""

import numpy as np
import torch


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sqnr(x, y):
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())


def nearest(x, levels):
    """The nearest of `levels` to each value, in float64."""
    levels = np.sort(np.asarray(levels, dtype=np.float64))
    return levels[np.abs(x[..., None] - levels).argmin(-1)]
