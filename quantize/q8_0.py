"""Q8_0 of flat groups, as llama2.c and KuiperLLama store it: int8 codes and one float32 scale a group (METHODS.md section 1)."""

import torch


def encode_flat(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Quantizes `weight` in flat row-major groups: scale ``max|w| / 127``, code ``round(w / scale)``, half to even.

    An all-zero group, or one whose scale is below float32's normal numbers, gets scale 1 and codes 0.

    Args:
        weight: floating point, any shape.
        group_size: values in a group; divides the number of values.

    Returns:
        Codes int8 (n,), scales float32 (n / group_size,), and the greatest absolute error over all values.

    Raises:
        ValueError: for a group size that does not divide the number of values, or NaN or inf in the weight.
    """
    count = weight.numel()
    if group_size < 1 or count % group_size:
        raise ValueError(f"group_size: {group_size} does not divide the {count} values of the tensor")
    groups = weight.detach().float().reshape(-1, group_size)
    if not torch.isfinite(groups).all():
        raise ValueError("the weight holds NaN or inf")
    greatest = torch.maximum(-groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
    scale = greatest / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    values = (groups / scale).round_()
    codes = values.to(torch.int8)
    error = float(values.mul_(scale).sub_(groups).abs_().max()) if count else 0.0
    return codes.reshape(-1), scale.reshape(-1), error


def decode_flat(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values (n,) that `codes` (n,) and `scales` (groups,) stand for."""
    return (codes.reshape(len(scales), -1).float() * scales.float()[:, None]).reshape(-1)
