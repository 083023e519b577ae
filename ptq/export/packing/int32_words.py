"""Codes below a byte in words of int32, as GPTQ's and AWQ's checkpoints hold them."""

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring codes lies in each four bits of a word of AWQ, the lowest first (Lin et al. 2023, its GEMM kernel)."""


def words(codes: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Returns codes packed along `dim` into int32, 32 / bits of them a word, the first in the lowest bits.

    Args:
        codes: whole numbers of 0 to 2^bits - 1, two dimensions; their number along `dim` is a multiple of 32 / bits.
        bits: 2, 4 or 8.
        dim: 0 or 1.
        order: which code of each run lies where; None for as they are.

    Raises:
        ValueError: for other bits, or a number that fills no whole words.
    """
    if bits not in {2, 4, 8}:
        raise ValueError(f"bits: {bits} fill no word of 32: use 2, 4 or 8")
    lanes = 32 // bits
    if codes.shape[dim] % lanes:
        raise ValueError(f"codes: {codes.shape[dim]} along dimension {dim} fill no whole words of {lanes}")
    runs = codes.long().unflatten(dim, (-1, lanes)).movedim(dim + 1, 0)
    total = torch.zeros_like(runs[0])
    for place, lane in enumerate(range(lanes) if order is None else order):
        total |= runs[lane] << (bits * place)
    # The upper half of the unsigned words is negative in int32.
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32).contiguous()
