"""How far a quantized tensor is from the original, and predictions from those that they are to be."""

import math

import torch

FLOOR_DB = 200.0
"""What `sqnr_db` returns for equal tensors: beyond float32's own precision."""
PIECE = 1 << 20
"""Values converted to float64 at once: a whole weight in float64 would be twice the model's own copy of it."""


def sqnr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the signal-to-quantization-noise ratio 10 log10(|x|^2 / |x - y|^2) in dB, `FLOOR_DB` when y equals x."""
    signal, noise = _energies(x, y)
    if noise == 0:
        return FLOOR_DB
    return -FLOOR_DB if signal == 0 else 10 * math.log10(signal / noise)


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns |x - y| / |x| in the Frobenius norm; 0 when both are zero.

    10^(`FLOOR_DB` / 20) when only x is zero: what -`FLOOR_DB` stands for, and finite, so that JSON can hold it.
    """
    signal, noise = _energies(x, y)
    if noise == 0:
        return 0.0
    return 10 ** (FLOOR_DB / 20) if signal == 0 else math.sqrt(noise / signal)


@torch.no_grad()
def kl_divergence(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns KL(target || predicted) of each token (...), float32, in nats, and its derivative by the logits, in their type.

    Args:
        logits: of what is tuned, (..., vocabulary).
        target: logits of the network that it is to predict like, of the same shape.
    """
    predicted, wanted = logits.float().log_softmax(-1), target.float().log_softmax(-1)
    probable = wanted.exp()
    divergence = (probable * wanted.sub_(predicted)).sum(-1)
    return divergence, predicted.exp_().sub_(probable).to(logits.dtype)


def _energies(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Returns the sums of squares of x and of x - y, in float64; ValueError when their shapes differ."""
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    signal = torch.zeros((), dtype=torch.float64, device=x.device)
    noise = torch.zeros_like(signal)
    for a, b in zip(x.reshape(-1).split(PIECE), y.reshape(-1).split(PIECE), strict=True):
        a = a.double()
        signal += a.square().sum()
        noise += (a - b.double()).square_().sum()
    return float(signal), float(noise)
