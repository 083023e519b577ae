"""Folding a rotation of the residual stream into the weights around it (QuaRot, section 4; SliceGPT, section 3).

The stream's rows h become h Q. What writes to it, y = a W^T + b, writes y Q: W <- Q^T W, b <- Q^T b. What reads it has its
columns turned, W <- W Q, and no other change. A norm without a gain commutes with Q, so gains go into the readers first, and
a LayerNorm's subtraction of the mean into the writers. All in float64 inside, returned in the type of the weight.

A rotation is a matrix (width, width), or a function that maps rows (..., width) to rows times Q in float64, such as
``functools.partial(hadamard_transform, signs=signs)``: O(n log n) for each row. A matrix smaller than the width turns each
block of so many channels, as heads need it.
"""

from collections.abc import Callable

import torch

PIECE = 1 << 22
"""Values of a weight that are in float64 at once: 32 MiB, more than a block's Linear of a small model has."""
Rotation = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
"""Q, or the function that multiplies rows by it."""


def rotate_reader(weight: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Returns W Q of a Linear's weight (out, width) that reads the stream; its bias stays. The same for an embedding
    (tokens, width), whose rows are the stream itself.

    Raises:
        ValueError: when the rotation's width does not divide the weight's.
    """
    return _by_rows(weight, lambda rows: _rows_times(rows, rotation))


def rotate_writer(
    weight: torch.Tensor, bias: torch.Tensor | None, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns Q^T W and Q^T b of a Linear (width, in), (width,) that writes to the stream.

    Raises:
        ValueError: when the rotation's width does not divide the number of rows.
    """
    turned = _rows_times(weight.t(), rotation).t().to(weight.dtype).contiguous()
    return turned, None if bias is None else _rows_times(bias, rotation).to(bias.dtype)


def fold_gain(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor,
    offset: float = 0.0,
    norm_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns weight and bias of a reader that takes over a norm's gain and bias: W diag(gain + offset) and b + W norm_bias.

    The norm is left with a gain of 1 (``weight`` 1 - offset) and no bias. A Linear without bias gains one where the norm has one
    that is not zero; it has the type of the weight.

    Args:
        weight: (out, width) of the Linear that reads what the norm writes.
        bias: (out,) or None.
        gain: (width,), the norm's weight.
        offset: 1 for norms that multiply by ``1 + weight`` (Gemma), 0 for all others.
        norm_bias: (width,), a LayerNorm's, or None.

    Raises:
        ValueError: for shapes that do not match.
    """
    _width("gain", gain, weight.shape[-1])
    gains = gain.double() + offset
    folded = _by_rows(weight, lambda rows: rows.double() * gains)
    if norm_bias is None:
        return folded, bias
    _width("norm_bias", norm_bias, weight.shape[-1])
    moved = weight.double() @ norm_bias.double()
    if bias is None:
        return folded, moved.to(weight.dtype) if bool((norm_bias != 0).any()) else None
    return folded, (bias.double() + moved).to(bias.dtype)


def center_writer(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (I - 11^T / width) W and b - mean(b) of a Linear (width, in) that writes to the stream: what it writes has mean 0.

    With every writer and embedding centred the stream has mean 0, and LayerNorm without gain and bias is RMSNorm.
    """
    wide = weight.double()
    centred = (wide - wide.mean(0)).to(weight.dtype)
    return centred, None if bias is None else (bias.double() - bias.double().mean()).to(bias.dtype)


def center_embedding(weight: torch.Tensor) -> torch.Tensor:
    """Returns an embedding (tokens, width), of tokens or positions, each row less its mean."""

    def centred(rows: torch.Tensor) -> torch.Tensor:
        wide = rows.double()
        return wide - wide.mean(-1, keepdim=True)

    return _by_rows(weight, centred)


def _by_rows(weight: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Returns what `change` makes of the rows of a weight (rows, width), in the weight's type.

    Some rows at a time: an embedding is most of what is in memory of a large model, and float64 would be twice or four times as much.
    """
    changed, count = torch.empty_like(weight), max(1, PIECE // max(1, weight.shape[-1]))
    for part, rows in zip(changed.split(count), weight.split(count), strict=True):
        part.copy_(change(rows))
    return changed


def _rows_times(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Returns rows of `x` (..., width) times Q, float64."""
    wide = x.double()
    if not isinstance(rotation, torch.Tensor):
        return rotation(wide)
    size = rotation.shape[0]
    if rotation.dim() != 2 or rotation.shape[1] != size or size < 1 or x.shape[-1] % size:
        raise ValueError(
            f"rotation: shape {tuple(rotation.shape)} is not valid: expected a square matrix whose width divides {x.shape[-1]}"
        )
    return (wide.reshape(-1, size) @ rotation.to(wide)).reshape(x.shape)


def _width(name: str, vector: torch.Tensor, width: int) -> None:
    if vector.shape != (width,):
        raise ValueError(f"{name}: shape {tuple(vector.shape)} is not valid: expected ({width},)")
