"""LLM.int8(): int8 products with the outlier columns of the input kept in floating point (Dettmers et al. 2022, section 3)."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from quantize.codecs.base import Codec, Encoded, absmax, divided, register, saturated
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec, spec_of

GREATEST = 127
WEIGHT = QuantSpec(bits=8, granularity="channel")
"""The weight's format: absmax int8, one scale an output channel (the paper's column-wise scaling of its transposed weight)."""
INT_MM_ROWS = 32
"""Rows that torch's int8 product on CUDA needs at least (more than 16), in a multiple of 8."""


class MixedInt8(Codec):
    """The format of the input: int8 absmax a token, except the columns that hold a magnitude of `threshold` or more.

    The columns are chosen from all tokens of a sample, and keep the type of the input (fp16 in the paper's models).
    """

    def couples_tokens(self, spec: QuantSpec) -> bool:
        """True: one token's magnitude makes a column an outlier for all of them."""
        return True

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes int8 (..., n), 0 in outlier columns; scale float32 (..., 1); columns int64 (k,); outliers (..., k)."""
        outlier = outlier_columns(x, spec.threshold)
        columns = outlier.nonzero().squeeze(-1)
        kept = x.masked_fill(outlier, 0)
        scale = absmax(kept) / GREATEST
        codes = divided(kept, scale).round_().to(torch.int8)
        return {"codes": codes, "scale": scale, "columns": columns, "outliers": x[..., columns]}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """Code times scale, and the outlier columns as they were."""
        return (parts["codes"].float() * parts["scale"]).index_copy(-1, parts["columns"], parts["outliers"].float())

    def fake(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """What `decode` gives of `encode`; outliers by mask, so that the device is not waited for."""
        outlier = outlier_columns(x, spec.threshold)
        kept = x.masked_fill(outlier, 0)
        scale = absmax(kept) / GREATEST
        return torch.where(outlier, x, saturated(divided(kept, scale).round_().mul_(scale), x.dtype))


def outlier_columns(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns which columns of `x` (..., n) hold a magnitude of `threshold` or more, bool (n,)."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if not len(rows):
        return torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    return torch.maximum(-rows.amin(0), rows.amax(0)) >= threshold


def llm_int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = 6.0,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, float]:
    """Returns ``x @ W.T + bias`` by LLM.int8(), in the type of `x`, and the share of outlier columns.

    Each sample of an `x` (samples, ..., in) has outlier columns of its own; the share is their mean. The int8 part has int32 sums, multiplied by the outer product of the scales; the outlier columns meet the same columns
    of the dequantized weight in the type of `x`; the two are added.

    Args:
        x: (tokens, in), or (samples, ..., in).
        codes: the weight's codes, int8 (out, in).
        scale: the weight's scales, float32 (out, 1).
        bias: (out,).
        threshold: magnitude from which a column is an outlier.
        multiply: gives the int8 part, float32 (rows, out), of an activation's codes (rows, in) and their scales (rows, 1); None for
            `int8_product` and the outer product of the scales.
    """
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], len(codes)), 0.0
    if x.dim() > 2:
        made = [llm_int8_linear(sample, codes, scale, bias, threshold, multiply) for sample in x]
        return torch.stack([y for y, _ in made]), sum(share for _, share in made) / len(made)
    parts = MIXED_INT8.quantize(x, spec_of("llm_int8", activation=True, threshold=threshold))
    rows = parts["codes"].reshape(-1, x.shape[-1])
    row_scale = parts["scale"].reshape(-1, 1)
    if multiply is None:
        # In the order of `quantize.kernels`, whose sums are these: the same bits.
        y = int8_product(rows, codes).float() * scale.reshape(1, -1) * row_scale
    else:
        y = multiply(rows, row_scale)
    y = y.view(*x.shape[:-1], len(codes))
    columns = parts["columns"]
    if len(columns):
        weight = saturated(codes[:, columns].float() * scale, x.dtype)
        y = y + functional.linear(parts["outliers"], weight).float()
    if bias is not None:
        y = y + bias.float()
    return saturated(y, x.dtype), len(columns) / x.shape[-1]


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b.T`` in int32 for int8 `a` (rows, n) and `b` (out, n), exact."""
    if a.device.type != "cuda":
        return torch._int_mm(a.contiguous(), b.t())
    # CUDA's kernel wants more than 16 rows and sizes in multiples of 8; zeros change no sum.
    rows, out, n = len(a), len(b), a.shape[1]
    a = functional.pad(a, (0, -n % 8, 0, max(INT_MM_ROWS - rows, -rows % 8)))
    b = functional.pad(b, (0, -n % 8, 0, -out % 8))
    return torch._int_mm(a, b.t())[:rows, :out]


MIXED_INT8 = MixedInt8()
register("llm_int8", Format((8,), ("token",), weight=False, instead="int with bits 8, granularity channel"), MIXED_INT8)
