"""How far a quantized tensor is from the original."""

import torch

FLOOR_DB = 200.0
"""What `sqnr_db` returns for equal tensors: beyond float32's own precision."""


def sqnr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the signal-to-quantization-noise ratio 10 log10(|x|^2 / |x - y|^2) in dB, `FLOOR_DB` when y equals x."""
    signal, noise = x.double().square().sum(), (x.double() - y.double()).square().sum()
    if noise == 0:
        return FLOOR_DB
    if signal == 0:
        return -FLOOR_DB
    return float(10 * torch.log10(signal / noise))


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns |x - y| / |x| in the Frobenius norm; 0 when both are zero."""
    noise, signal = (x.double() - y.double()).norm(), x.double().norm()
    return float(noise / signal) if signal > 0 else (0.0 if noise == 0 else float("inf"))
