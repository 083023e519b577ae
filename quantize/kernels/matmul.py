"""Products of matrices on CPUs: of float32 by oneDNN, of 16 bits in float32 where the CPU has no such products.

torch multiplies float32 matrices by MKL, which leaves out AVX-512 on CPUs that are not Intel's: on an AMD EPYC with it, oneDNN,
which torch ships too, is twice as fast (`python -m experiments.bench.products`). Without AVX-512 MKL is as fast or a little faster,
oneDNN takes no bfloat16 and float16, and torch's own loops for these are seven times as slow as converting both sides. The results differ
by rounding. All else is torch's.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

SMALL = 1 << 20
"""Multiplications below which torch's own product is as fast: a call of oneDNN costs some microseconds more."""

STRIP = 256
"""Rows of a symmetric matrix that are multiplied together."""
SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""torch's operation that tells whether oneDNN takes a type."""
WIDENED = 1 << 24
"""Numbers of a 16-bit weight that are converted at a time: 64 MiB in float32."""
FEW = 4
"""Rows below which converting a 16-bit weight takes longer than torch's loops."""
TOKENS = 512
"""Tokens whose copy is transposed at a time: a few MiB."""

STEP, MANY = 8, 1024
"""Up to so many rows their number is filled up with zeros to a multiple of 8 at least. oneDNN makes a program for every shape and
keeps a thousand: for the tokens of experts, ever another number of them, that is a MiB and half a millisecond each. A product with more
rows may round otherwise on some processors; the same call always rounds alike.
"""
ROWS, INNER = 8, 4
"""Numbers between a power of two and the next one that remain, of rows and of what is summed over: a moment's strips are four shapes."""


class _Mode(threading.local):
    fast = False


_MODE = _Mode()


@contextmanager
def fast_linears(enabled: bool = True) -> Iterator[None]:
    """Inside the context `linear` may round otherwise than torch does, and be faster. For this thread; may be nested."""
    before, _MODE.fast = _MODE.fast, enabled
    try:
        yield
    finally:
        _MODE.fast = before


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x W^T + b, as `torch.nn.functional.linear`: (..., in), (out, in) and (out,) give (..., out).

    Inside `fast_linears` it may differ from that by rounding; outside it has the same bits, so that what is evaluated is what
    other programs compute with the same weights: one rounding error turns an 8-bit code that lies between two.
    """
    return _product(x, weight, bias) if _MODE.fast else functional.linear(x, weight, bias)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a b, as `a @ b` but for rounding: (..., inner) and (inner, columns) give (..., columns)."""
    return _product(a, b.t(), None)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if by_float32(x, weight, bias):
        return _widened(x, weight, bias)
    if not by_onednn(x, weight, bias):
        return functional.linear(x, weight, bias)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN would take its reference loops, 1,000 times as slow.
    count = x.numel() // x.shape[-1]
    if more := filled(count) - count:
        rows = functional.pad(x.reshape(count, -1), (0, 0, 0, more))
        return _by_onednn(rows, weight, bias)[:count].view(*x.shape[:-1], len(weight))
    return _by_onednn(x, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def by_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Returns whether this is a product of 16 bits for which the CPU has no instructions."""
    if x.dtype not in SUPPORTED or not _is_ours(x, weight, bias):
        return False
    return x.numel() // x.shape[-1] >= FEW and not _is_supported(x.dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has instructions for products of bfloat16, which are faster than float32's."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_multiplies_bfloat16()


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    # A torch without the question may be without the products.
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked()) and torch.backends.mkldnn.is_available()


@functools.cache
def _is_supported(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN has products of this type on this CPU, or torch was built without it: then nothing is known."""
    asked = getattr(torch.ops.mkldnn, SUPPORTED[dtype], None)
    return asked is None or bool(asked())


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns the product computed in float32, rounded once."""
    wide, rows = x.float(), max(1, WIDENED // weight.shape[1])
    strips = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    parts = [_product(wide, weight[s].float(), None if bias is None else bias[s].float()).to(x.dtype) for s in strips]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def filled(count: int, steps: int = ROWS) -> int:
    """Returns the least number from `count` on that oneDNN is to see: up to 8 and beyond 1024 any, else a multiple of 8 and of the
    power of two below divided by `steps`.
    """
    if not STEP < count <= MANY:
        return count
    step = max(STEP, (1 << count.bit_length() >> 1) // steps)
    return -(-count // step) * step


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Adds X^T X to the upper triangle of `total`, in place; below the diagonal it holds nothing of use.

    Only the right parts of strips of rows are computed, little more than half of the whole. A float32 `x` is not copied whole.

    Args:
        total: float32 (channels, channels).
        x: floating point (tokens, channels).
    """
    on_cpu = x.device.type == "cpu"
    for part in x.split(TOKENS) if on_cpu else (x,):
        rows = part.float().t()
        if on_cpu:
            # oneDNN wants both sides of a strip in one piece, and few numbers of tokens; zeros add nothing.
            rows = functional.pad(rows, (0, filled(len(part), INNER) - len(part))).contiguous()
        for start in range(0, len(total), STRIP):
            total[start : start + STRIP, start:] += product(rows[start : start + STRIP], rows[start:].t())


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric matrix with the upper triangle of `total`, (channels, channels).

    Strip by strip: of matrices that are larger than the caches each pass costs what half a multiplication of a sample does.
    """
    whole = total.triu()
    for start in range(0, len(whole), STRIP):
        end = start + STRIP
        square = whole[start:end, start:end]
        square += square.triu(1).t()
        whole[end:, start:end] = whole[start:end, end:].t()
    return whole


def row_squares(x: torch.Tensor, symmetric: torch.Tensor) -> torch.Tensor:
    """Returns diag(X S X^T) of `x` (rows, channels) and a symmetric matrix (channels, channels): (rows,)."""
    total = x.new_zeros(len(x))
    for start in range(0, len(symmetric), STRIP):
        part = product(x[:, start : start + STRIP], symmetric[start : start + STRIP, start:])
        part[:, STRIP:] *= 2  # What lies below the diagonal is its mirror image.
        total += part.mul_(x[:, start:]).sum(1)
    return total


class Linear(nn.Linear):
    """An `nn.Linear` that `fast_linears` makes fast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + b."""
        return linear(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Returns whether `module` is torch's own Linear or this module's, and no other subclass."""
    return type(module) in {nn.Linear, Linear}


def use_fast_linears(model: nn.Module) -> None:
    """Makes every `nn.Linear` of `model` a `Linear`, in place: parameters, hooks and state are the same. Subclasses stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Returns whether this product is left to oneDNN where it may be."""
    if x.dtype != torch.float32 or not _is_ours(x, weight, bias):
        return False
    return _is_ahead() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()


def _is_ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Returns whether a product is one of this module's: of one type, on a CPU, large, and without a derivative, which oneDNN's
    operation has not.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(t.device.type != "cpu" or t.dtype != x.dtype for t in tensors) or x.numel() * len(weight) < SMALL:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


@functools.cache
def _is_ahead() -> bool:
    """Returns whether oneDNN may be faster than what torch takes: without AVX-512 it is not than MKL."""
    return not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX2"
