"""Whether a tensor holds NaN or inf, at the price of one pass over it."""

import torch


def all_finite(x: torch.Tensor) -> bool:
    """Returns whether no element of `x`, floating point of any shape, is NaN or inf.

    NaN and inf survive a sum, so a finite sum settles it; only where the sum itself overflows is each element looked at.
    """
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
