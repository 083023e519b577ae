"""GPTQ by columns of tiles: all tiles of 16 columns are coded, and the columns not yet coded make up for the error.

Block LDLQ (Chee et al. 2023, QuIP; Tseng et al. 2024, QTIP, section 3.3) in GPTQ's terms. With V and the pivots p of
`quantize.solvers.factorisation.Factor`, S the blocks of 16 x 16 on V's diagonal, B = S^-1 V has identities there: an error E in a
block of columns is made up for by -E B_bc in the later block c, and costs tr(E S^-1 diag(p) S^-T E^T) for good. The search in a
tile weighs each column by the diagonal of that matrix.
"""

from dataclasses import replace

import torch

from quantize.codecs.base import Encoded, divided
from quantize.codecs.packing import pack
from quantize.codecs.registry import codec_of
from quantize.codecs.trellis.codec import SIDE, Trellis, codes_of, sequences, weights_of
from quantize.kernels.matmul import product
from quantize.solvers.factorisation import Factor, Failure, factorise
from quantize.spec.quant_spec import QuantSpec


def has_tiles(spec: QuantSpec) -> bool:
    """Whether a format codes the weights of a tile together, and has no levels for single ones."""
    return isinstance(codec_of(spec), Trellis)


def factorise_blocks(hessian: torch.Tensor, damping: float, act_order: bool) -> Factor | Failure:
    """Returns `factorise` with the columns in blocks of 16 that stay together.

    Args:
        hessian: as for `factorise`, and so is `damping`; its columns a multiple of 16.
        act_order: blocks by the descending sum of the Hessian's diagonal; else from left to right.
    """
    if not act_order:
        return factorise(hessian, damping, False)
    sums = hessian.diagonal().view(-1, SIDE).sum(1)
    blocks = sums.argsort(descending=True, stable=True)
    order = (blocks[:, None] * SIDE + torch.arange(SIDE, device=hessian.device)).flatten()
    found = factorise(hessian[order][:, order], damping, False)
    return found if isinstance(found, Failure) else replace(found, order=order)


def code_with_feedback(weight: torch.Tensor, hessian: torch.Tensor, factor: Factor, spec: QuantSpec) -> Encoded:
    """Returns what the codec stores of a weight: codes by block feedback, then the scale of each row by least squares.

    The rows' first scales are the codec's: making up for errors of earlier columns widens what is coded by a few percent, and
    scales as much wider were measured not to lose less.

    Args:
        weight: float32 (out, in), 0 in columns that are not used.
        hessian: (in, in).
        factor: what `factorise_blocks` made of it.
        spec: a format whose codec is `Trellis`.

    Raises:
        ValueError: for columns that are no multiple of 16, or another format.
    """
    codec = codec_of(spec)
    if not isinstance(codec, Trellis):
        raise ValueError(f"format: {spec.format!r} has no tiles")
    rows, columns = weight.shape
    shares, costs = block_factor(factor)
    scale = codec.scale(weight)
    search = codec.viterbi(spec, weight.device)
    wanted = weight.t()[factor.order]
    codes = torch.empty(-(-rows // SIDE), columns // SIDE, SIDE * SIDE, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, SIDE):
        here = slice(start, start + SIDE)
        weights = (costs[here] / costs[here].mean()).tolist() * SIDE
        block = wanted[here].t()
        states = search.loops(sequences(divided(block, scale)), weights)
        found = weights_of(search.values[states], rows, SIDE) * scale
        codes[:, int(factor.order[start]) // SIDE] = codes_of(states, SIDE, spec.bits)
        wanted[here.stop :] -= product(shares[here, here.stop :].t(), (block - found).t())
    stored = {"codes": pack(codes.flatten(1), spec.bits), "scale": scale}
    return {
        **stored,
        "scale": scale * _fitted(weight, codec.decode(stored, spec, weight.shape), factor.damped(hessian)),
    }


def block_factor(factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns B (in, in), of which only what lies right of the diagonal's blocks is read, and what an error in each column costs."""
    shares, costs = factor.triangle.clone(), torch.empty_like(factor.pivots)
    for start in range(0, len(costs), SIDE):
        here = slice(start, start + SIDE)
        one = torch.eye(SIDE, dtype=shares.dtype, device=shares.device)
        inverse = torch.linalg.solve_triangular(factor.triangle[here, here], one, upper=True, unitriangular=True)
        costs[here] = (inverse.square() * factor.pivots[here]).sum(1)
        shares[here, here.stop :] = product(inverse, factor.triangle[here, here.stop :])
    return shares, costs


def _fitted(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Returns the factor of each row, (out, 1), with which its values come nearest to the weight under the Hessian."""
    weighed = product(values, hessian)
    size = (weighed * values).sum(1, keepdim=True)
    factor = (weighed * weight).sum(1, keepdim=True) / torch.where(size > 0, size, torch.ones_like(size))
    return torch.where(size > 0, factor.clamp(min=0), torch.ones_like(factor))
