"""WUSH (arXiv 2512.00956): the closed-form pair of transforms that gives inputs and weights the same, diagonal second moments.

With the Cholesky factors W' W'^T = W^T W and X' X'^T = X^T X / n and the singular value decomposition U S V^T = W'^T X',
for columns x and w: T_x = H S^-1/2 U^T W'^T and T_w = H S^-1/2 V^T X'^T. Then T_w^T T_x = X' V S^-1 U^T W'^T = I, so w . x is
kept, and the second moments of both become H S H^T, whose diagonal is constant for a Hadamard H. For rows, as here:
``x @ A`` with A = T_x^T and ``W @ B`` with B = T_w^T = A^-T.

U and S^2 are the eigenvectors and eigenvalues of W'^T (X^T X / n) W', a third of the work of the singular value decomposition.
What squaring loses is the machine's precision times S_1^2 / S_n^2: where that ratio is great, the decomposition is made as published.

A map that serves rounding wants less than the moments say of their least directions. `Decomposed` is made once, in float32, and gives a
map for every share of the mean of S^2 that is added to it: great ones make the map W' U H, of which the moments of the input say nothing
but the order. What float32 loses of S^2 lies below the least share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantize.kernels.matmul import linear, product
from quantize.transforms.hadamard import hadamard_transform

SQUARED = 1e-9
"""Least S_n^2 / S_1^2 that is read off the squared matrix: about a millionth of it is lost there."""
FACTORS = 1e-2
"""Share of the mean of each diagonal that `decomposed` adds to both moments: without it great shares of S^2 would be drawn to W' alone."""
MOST_DAMPING = 1.0
"""Greatest share of the mean diagonal that is added: dampings are tried, each 10 times the one before, up to this one."""


@dataclass(frozen=True)
class Wush:
    """The transform of inputs, block by block, float64; that of the weights is its inverse, transposed.

    Attributes:
        activation: A (blocks, size, size): a block of inputs (..., size) becomes x @ A.
        singular: S (blocks, size), descending: second moments of both, before the Hadamard.
        damping_activation: what was added to the diagonal of X^T X / n, as a share of its mean in each block.
        damping_weight: the same of W^T W.
        log_volume: log |det A| (blocks,).
    """

    activation: torch.Tensor
    singular: torch.Tensor
    damping_activation: float
    damping_weight: float
    log_volume: torch.Tensor

    def unit_volume(self) -> torch.Tensor:
        """Returns A (blocks, size, size), each block divided by the number that gives it a determinant of 1 or -1."""
        # By the logarithm: the determinant itself of a thousand channels leaves float64.
        return self.activation / (self.log_volume / self.activation.shape[-1]).exp()[:, None, None]


@dataclass(frozen=True)
class Decomposed:
    """The moments of a Linear's input and weights, block by block, decomposed once for the transforms of all dampings.

    Attributes:
        vectors: W' U, of a determinant of 1 or -1, float32 (blocks, size, size).
        duals: its inverse, transposed, which is W'^-T U, float32 (blocks, size, size).
        squares: S^2 as shares of their mean in each block, float32 (blocks, size), descending; 0 or more.
    """

    vectors: torch.Tensor
    duals: torch.Tensor
    squares: torch.Tensor

    def unit_volume(self, damping: float, hadamard: bool = True) -> torch.Tensor:
        """Returns A = W' U S^-1/2 H, float32 (blocks, size, size), each block times what gives it a determinant of 1 or -1: a block of
        inputs (..., size) becomes x @ A. `damping` times the mean of S^2 is added to S^2 first.

        Raises:
            ValueError: for a damping that is not above 0.
        """
        return _spread(self.vectors * self._scale(damping)[:, None, :], hadamard)

    def behind(
        self, inputs: torch.Tensor, weight: torch.Tensor, hadamard: bool = True
    ) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
        """Returns what gives `inputs` (tokens, in) and a `weight` (out, in) behind the map of a damping, in their types.

        Both are multiplied by matrices here, once for all dampings: S^-1/2 and H are left, and the weight needs no inverse,
        since A^-T = W'^-T U S^1/2 H.
        """
        mixed, dual = block_apply(inputs, self.vectors), block_apply(weight, self.duals)
        size = self.vectors.shape[-1]

        def of(damping: float) -> tuple[torch.Tensor, torch.Tensor]:
            scale = self._scale(damping).flatten()
            return _spread(mixed * scale, hadamard, size), _spread(dual / scale, hadamard, size)

        return of

    def _scale(self, damping: float) -> torch.Tensor:
        """Returns S^-1/2 (blocks, size) after the damping, of a volume of 1."""
        if not damping > 0:
            raise ValueError(
                f"damping: {damping} is not valid: expected a share of the mean of S^2 above 0, such as 0.01"
            )
        logs = (self.squares + damping).log() / 4
        # W' has a volume of 1 already; by the logarithm, as above.
        return (logs.mean(-1, keepdim=True) - logs).exp()


def decomposed(hessian: torch.Tensor, gram: torch.Tensor, block: int | None = None) -> Decomposed:
    """Returns what `wush` is made of, in float32: arguments and errors are its own, but that both moments have `FACTORS` added."""
    size = _checked(hessian, gram, block)
    moments = diagonal_blocks(hessian, size)
    weights, _ = _cholesky("gram", diagonal_blocks(gram, size), FACTORS)
    moments.diagonal(dim1=1, dim2=2).add_(FACTORS * _means("hessian", moments)[:, None])
    unit = weights.diagonal(dim1=1, dim2=2).log().mean(1).exp()
    factors = (weights / unit[:, None, None]).float()
    moments /= _means("hessian", moments)[:, None, None]
    squared = torch.stack([product(product(f.t(), m), f) for f, m in zip(factors, moments.float(), strict=True)])
    squared /= squared.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    squares, vectors = torch.linalg.eigh(squared)
    vectors = vectors.flip(-1)
    return Decomposed(
        torch.stack([product(f, v) for f, v in zip(factors, vectors, strict=True)]),
        torch.linalg.solve_triangular(factors.mT, vectors, upper=True),
        squares.flip(-1).clamp(min=0),
    )


def wush(
    hessian: torch.Tensor,
    gram: torch.Tensor,
    block: int | None = None,
    hadamard: bool = True,
    damping: float = 1e-4,
) -> Wush:
    """Returns WUSH's transform of a Linear's input, in float64 on the device of `hessian`.

    Args:
        hessian: X^T X / n (in, in), any positive factor times it, symmetric.
        gram: W^T W (in, in), summed over all weights that read the input.
        block: consecutive channels that are transformed together; None: all.
        hadamard: multiply by a Hadamard matrix of the block at the end, which spreads what S concentrates.
        damping: share of the mean of each block's diagonal that is added to it; multiplied by 10 while a factorisation fails.

    Raises:
        ValueError: for shapes that differ or are not square, NaN or inf, a negative damping, a block that does not divide, or
            factorisations that fail at every damping.
    """
    if not damping >= 0:
        raise ValueError(f"damping: {damping} is not valid: expected 0 or a small positive share, such as 1e-4")
    size = _checked(hessian, gram, block)
    moments = diagonal_blocks(hessian, size)
    weights, used_weights = _cholesky("gram", diagonal_blocks(gram, size), damping)
    u, s, used_inputs = _decomposed(moments, weights, damping)
    activation = _spread((weights @ u) / s.sqrt()[:, None, :], hadamard)
    log_volume = weights.diagonal(dim1=1, dim2=2).log().sum(1) - s.log().sum(1) / 2
    return Wush(activation, s, used_inputs, used_weights, log_volume)


def block_apply(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Returns `x` (..., blocks * size) with each block of channels times its matrix of (blocks, size, size), in the type of `x`.

    Computed in float32, in float64 where either operand is.

    Raises:
        ValueError: when the channels are not blocks * size.
    """
    blocks, size = matrices.shape[:2]
    if x.shape[-1] != blocks * size:
        raise ValueError(f"x: {x.shape[-1]} channels, expected {blocks} blocks of {size}")
    wide = torch.float64 if torch.float64 in (x.dtype, matrices.dtype) else torch.float32
    if blocks == 1:
        return linear(x.to(wide), matrices[0].to(wide).t()).to(x.dtype)
    rows = x.reshape(-1, blocks, size).to(wide)
    return torch.einsum("nbi,bij->nbj", rows, matrices.to(rows)).reshape(x.shape).to(x.dtype)


def diagonal_blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the blocks (blocks, size, size) on the diagonal of `matrix` (blocks * size, blocks * size), as a float64 copy.

    Raises:
        ValueError: when `size` does not divide.
    """
    if size < 1 or len(matrix) % size:
        raise ValueError(f"size: {size} is not valid: expected a divisor of {len(matrix)}")
    view = matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    blocks = view.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # One float64 block would be the matrix itself.
    return blocks.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _checked(hessian: torch.Tensor, gram: torch.Tensor, block: int | None) -> int:
    """Returns the channels of a block. `ValueError` for shapes that do not fit."""
    width = hessian.shape[-1]
    if hessian.shape != (width, width) or gram.shape != hessian.shape:
        raise ValueError(f"gram: shape {tuple(gram.shape)} for a hessian {tuple(hessian.shape)}: expected two (in, in)")
    size = width if block is None else block
    if size < 1 or width % size:
        raise ValueError(f"block: {block} is not valid: expected a divisor of {width}")
    return size


def _spread(matrices: torch.Tensor, hadamard: bool, block: int | None = None) -> torch.Tensor:
    """Returns `matrices` (..., size) times a Hadamard matrix, where asked for; of so many of the channels each, with a `block`."""
    return hadamard_transform(matrices, block=block) if hadamard else matrices


def _decomposed(
    moments: torch.Tensor, weights: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns U (blocks, size, size) and S (blocks, size), descending, of W'^T X', and the share that was added to the `moments`."""
    mean = _means("hessian", moments)
    damped = moments.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping * mean[:, None])
    squares, vectors = torch.linalg.eigh(weights.mT @ damped @ weights)
    if bool((squares[:, 0] > SQUARED * squares[:, -1]).all()):
        return vectors.flip(-1), squares.flip(-1).sqrt(), damping
    inputs, used = _cholesky("hessian", moments, damping)
    u, s, _ = torch.linalg.svd(weights.mT @ inputs)
    return u, s, used


def _means(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """Returns the mean (blocks,) of each diagonal of `blocks` (blocks, size, size), 1 for a block in which nothing ever was: it gets
    the identity, and so does its partner's share of the transform. ValueError for NaN or inf.
    """
    if not bool(torch.isfinite(blocks).all()):
        raise ValueError(f"{name}: holds NaN or inf: expected second moments that are finite")
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _cholesky(name: str, blocks: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Returns the lower factors of `blocks` (blocks, size, size), damped until all succeed, and the share that was added."""
    mean = _means(name, blocks)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    floor = blocks.shape[-1] * torch.finfo(blocks.dtype).eps
    share = damping
    while share <= MOST_DAMPING:
        factor, failed = torch.linalg.cholesky_ex(blocks + (share * mean)[:, None, None] * identity)
        pivots = factor.diagonal(dim1=1, dim2=2).square() / mean[:, None]
        if not bool(failed.any()) and bool((pivots > floor).all()):
            return factor, share
        share = max(share * 10, 1e-8)
    raise ValueError(f"{name}: not positive definite at a damping of {share / 10:g}: expected second moments X^T X")
