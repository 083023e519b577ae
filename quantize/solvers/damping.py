"""How much GPTQ's Hessian is damped, chosen by what it loses on tokens that it has not seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from quantize.checks import all_finite
from quantize.kernels.matmul import row_squares
from quantize.solvers.gptq import GptqOptions

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the mean of the Hessian's diagonal to try."""


@dataclass(frozen=True)
class Chosen:
    """A damping and why.

    Attributes:
        damping: the one with the least loss, the smallest on ties.
        losses: tr(D H D^T) / (2 out) on the held-out tokens with each damping, in the order in which they were tried.
    """

    damping: float
    losses: list[float]


@torch.no_grad()
def held_out_damping(
    weight: torch.Tensor,
    held: torch.Tensor,
    quantized: Callable[[GptqOptions], torch.Tensor],
    options: GptqOptions,
    dampings: Sequence[float] = DAMPINGS,
) -> Chosen:
    """Returns the damping with which the weight solved on one part of the tokens serves another part best.

    A Hessian of few tokens says more than is true of their text: on SmolLM2's widest Linears with 4,096 tokens damping 0.1 to
    0.3 left 18 to 24% less error on other text than the usual 0.01. What is chosen on a part of the tokens is on the safe side
    for all of them: more tokens need less damping.

    Args:
        weight: (out, in).
        held: H of the tokens that were held out, (in, in).
        quantized: solves the weight on the other tokens with these options, and returns the values (out, in).
        options: whose damping is varied.
        dampings: to try.

    Raises:
        ValueError: for a Hessian that does not fit or holds NaN or inf, or no damping to try.
    """
    size = weight.shape[1]
    if held.shape != (size, size) or not all_finite(held):
        raise ValueError(f"held: shape {tuple(held.shape)} does not fit a weight {tuple(weight.shape)}, or NaN or inf")
    if not dampings:
        raise ValueError("dampings: expected one or more")
    weight, held = weight.float(), held.to(weight.device).float()
    tried = [weight - quantized(replace(options, damping=damping)) for damping in dampings]
    losses = torch.stack([row_squares(d, held).clamp_(min=0).mean() / 2 for d in tried]).tolist()
    best = min(range(len(losses)), key=lambda i: (losses[i], dampings[i]))
    return Chosen(dampings[best], losses)
