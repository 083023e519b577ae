"""SmoothQuant's arithmetic (Xiao et al. 2022, equations 3 and 4): scale per channel, and who is divided and multiplied by it."""

import torch

FLOOR = 1e-5
"""Least magnitude that the formula sees (METHODS.md section 3)."""


def smoothing_scale(
    activation: torch.Tensor, weight: torch.Tensor, alpha: float, beta: float | None = None
) -> torch.Tensor:
    """Returns s_j = max|X_j|^alpha / max|W_j|^beta, float32 (channels,), both maxima at least `FLOOR`.

    A channel in which the activation or every weight is zero carries nothing: its scale is 1.

    Args:
        activation: greatest magnitude of each channel over all tokens, (channels,).
        weight: greatest magnitude of each column over all weights that read the activation, (channels,).
        alpha: migration strength, 0 to 1.
        beta: exponent of the weights, 0 to 1; None is SmoothQuant's 1 - alpha. Alpha 0 with beta 0.5 halves the spread of the
            columns (in the logarithm), whatever the activation.

    Raises:
        ValueError: for alpha or beta outside 0 .. 1, unlike shapes, or NaN or inf.
    """
    beta = 1 - alpha if beta is None else beta
    for name, exponent in (("alpha", alpha), ("beta", beta)):
        if not 0 <= exponent <= 1:
            raise ValueError(f"{name}: {exponent} is not valid: expected a number from 0 to 1")
    if activation.shape != weight.shape:
        raise ValueError(f"weight: shape {tuple(weight.shape)} is not the activation's {tuple(activation.shape)}")
    for name, tensor in (("activation", activation), ("weight", weight)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: holds NaN or inf: take the statistics again")
    wide = activation.double().clamp_min(FLOOR).pow(alpha) / weight.double().clamp_min(FLOOR).pow(beta)
    dead = (activation == 0) | (weight == 0)
    return torch.where(dead, torch.ones_like(wide), wide).float()


def shared_scale(channels: torch.Tensor, repeat: int, head_dim: int) -> torch.Tensor:
    """Returns maxima (heads * head_dim,) of what query heads read as maxima of the value heads, (heads / repeat * head_dim,).

    With grouped-query attention `repeat` consecutive query heads read one value head, and share its scale: the greatest
    counts. `repeat` 1 returns `channels` as it is.
    """
    if repeat == 1:
        return channels
    return channels.view(-1, repeat, head_dim).amax(1).reshape(-1)


def divide_norm(weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, offset: float) -> None:
    """Divides what a norm writes by `scale` (channels,), in place: its gain ``weight + offset``, and its bias.

    `offset` is 1 for norms that multiply by ``1 + weight`` (Gemma), 0 for all others.
    """
    scale = scale.to(weight.device)
    weight.copy_((weight + offset) / scale - offset)
    if bias is not None:
        bias.div_(scale)


def divide_rows(weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> None:
    """Divides what a Linear writes by `scale` (out,), in place: the rows of its weight (out, in), and its bias (out,)."""
    scale = scale.to(weight.device)
    weight.div_(scale[:, None])
    if bias is not None:
        bias.div_(scale)


def multiply_columns(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Multiplies the columns of a weight (out, in) by `scale` (in,), in place: it reads what was divided by it."""
    weight.mul_(scale.to(weight.device))
