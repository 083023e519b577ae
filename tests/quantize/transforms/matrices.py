"""What matrices are measured by."""

import torch


def orthogonality_error(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the greatest |Q^T Q - I|, a float64 scalar."""
    wide = matrix.double()
    return (wide.t() @ wide - torch.eye(len(wide), dtype=wide.dtype)).abs().amax()
