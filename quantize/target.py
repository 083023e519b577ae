"""What a quantized Linear should reproduce when its input has changed too: the original output on the original input."""

import torch


class CrossMoment:
    """Accumulates C = 2 X^T Y / n over n tokens, X the original input of a Linear, Y the one it gets after quantization.

    Args:
        channels: input channels of the Linear.
        device: where the inputs are.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._sum = torch.zeros(channels, channels, device=device)

    @torch.no_grad()
    def update(self, original: torch.Tensor, present: torch.Tensor) -> None:
        """Adds the same tokens of both inputs (..., channels). Raises `ValueError` when their shapes differ."""
        if original.shape != present.shape:
            raise ValueError(f"present: shape {tuple(present.shape)} is not the original's {tuple(original.shape)}")
        x, y = (t.detach().reshape(-1, t.shape[-1]).float() for t in (original, present))
        self._sum.addmm_(x.t(), y)
        self.count += len(x)

    @property
    def matrix(self) -> torch.Tensor:
        """C, float32 (channels, channels); zeros before the first token."""
        return self._sum * (2 / max(self.count, 1))


@torch.no_grad()
def corrected_weight(weight: torch.Tensor, cross: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the weight (out, in) whose output on the present input Y comes closest to ``W X`` on the original one.

    min_V |W X - V Y|^2 + d |V - W|^2 with d = `damping` times the mean of diag(H): V = W + W (C - H) (H + d I)^-1.
    Since |W X - Q Y|^2 = |(V - Q) Y|^2 + a constant (for d = 0), a solver given V and H minimises the error against the
    original output, and makes up for what the quantized layers before have done.

    Args:
        weight: (out, in).
        cross: C of `CrossMoment`, (in, in).
        hessian: H = 2 Y^T Y / n, (in, in).
        damping: above 0; how strongly V is held to W where the tokens say little.

    Raises:
        ValueError: for shapes that do not fit, NaN or inf, or a damping that is not above 0.
    """
    size = weight.shape[1]
    if cross.shape != (size, size) or hessian.shape != (size, size):
        raise ValueError(
            f"cross, hessian: shapes {tuple(cross.shape)}, {tuple(hessian.shape)} do not fit {size} columns"
        )
    if not damping > 0:
        raise ValueError(f"damping: {damping} is not valid: expected a number above 0, such as 0.01")
    if not (torch.isfinite(cross).all() and torch.isfinite(hessian).all()):
        raise ValueError("cross, hessian: NaN or inf")
    mean = hessian.diagonal().mean()
    if mean == 0:
        return weight
    # In float64: the difference C - H of near equals is divided by small eigenvalues.
    damped = hessian.double()
    damped.diagonal().add_(damping * mean)
    change = torch.linalg.solve(damped, (cross.double() - hessian.double()).t() @ weight.double().t())
    return (weight.double() + change.t()).to(weight.dtype)
