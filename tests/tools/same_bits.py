"""What two runs must have the same bits of."""

import torch

from experiments.bench.kills import results_of as results

__all__ = ["results", "same"]


def same(a, b):
    """Asserts that two `results` are equal."""
    assert a[:2] == b[:2]
    assert a[2].keys() == b[2].keys()
    for name, tensors in a[2].items():
        assert tensors.keys() == b[2][name].keys()
        assert all(torch.equal(t, b[2][name][key]) for key, t in tensors.items()), name
