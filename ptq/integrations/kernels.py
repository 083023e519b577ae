"""Who multiplies in a packed model: kernels by themselves, one by name, or none; what they hold, and why some do not."""

import pathlib
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ptq.errors import UserError, one_of
from ptq.files.kernel_timings import KeptTimings
from ptq.integrations.attention_parts import use_attention_in_parts_
from quantize.codecs.llm_int8 import WEIGHT
from quantize.kernels.base import SIMULATED
from quantize.kernels.choice import AUTO, Choice
from quantize.kernels.stored import HOLD_BITS, able, stored_names
from quantize.modules.packed import INTEGER_PART, LlmInt8Linear, PackedLinear
from quantize.modules.shared_input import SharedInput


@dataclass(frozen=True)
class KernelUse:
    """Who multiplies in the packed Linears of a model.

    Attributes:
        linears: how many Linears have integer kernels, a kernel of whole Linears, or a weight that is decoded at each call.
        reasons: how many are decoded at each call, by the reason.
        held_bytes: what kernels hold at present beside the stored codes; they pack when they are first called.
    """

    linears: dict[str, int]
    reasons: dict[str, int]
    held_bytes: int


def use_kernels_(
    model: nn.Module, kernels: str = AUTO, hold_bits: float = HOLD_BITS, cache: pathlib.Path | None = None
) -> KernelUse:
    """Lets kernels multiply in the packed Linears of `model`; the fastest for a number of rows is found by a short timing.

    The attention of a model of transformers that has the usual one (`sdpa`) computes causal windows in parts beside them.

    Args:
        model: with packed Linears.
        kernels: ``auto``, ``simulated`` (weights are decoded at each call), or a kernel's name (``ptq show kernels``).
        hold_bits: bits a weight that kernels may hold beside what is stored, with ``auto``: 8 lets codes lie one a byte, 16 or 32
            lets weights be dequantized once.
        cache: the store that keeps timings; None for ``~/.cache/ptq``.

    Raises:
        UserError: for a kernel that is not there, that is not installed, or that one of the Linears cannot have here.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if kernels not in stored_names():
        raise UserError(f"kernels: {kernels!r} is not valid: {one_of(kernels, stored_names())}")
    if not hold_bits >= 0:
        raise UserError(
            f"hold_bits: {hold_bits!r} is not valid: expected a number of bits a weight, such as {HOLD_BITS:g}"
        )
    choice = Choice(kernels, hold_bits=hold_bits)
    for name, module in packed.items():
        found = _able(choice, module)
        if kernels not in {AUTO, SIMULATED} and not found[0]:
            others = [k for k in stored_names()[2:] if _able(Choice(k), module)[0]]
            raise UserError(
                f"kernels: {kernels!r} cannot multiply {name}: {found[1]}: use {', '.join([*others, AUTO, SIMULATED])}"
            )
    kept = KeptTimings(next((_device(m) for m in packed.values()), torch.device("cpu")), cache)
    choice.timings, choice.keeper = kept.recall(), kept
    shared = SharedInput()
    for module in packed.values():
        module.use_kernels(choice if kernels != SIMULATED else None, shared)
    use_attention_in_parts_(model, bool(packed) and kernels != SIMULATED)
    return kernel_use(model)


def kernel_use(model: nn.Module) -> KernelUse:
    """Returns who multiplies in the packed Linears of `model`, and what kernels hold at present."""
    linears: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    held = 0
    for module in model.modules():
        if not isinstance(module, PackedLinear):
            continue
        choice = module.kernel_choice
        kind, reason = (None, "asked for") if choice is None else _able(choice, module)
        linears[kind or "decoded"] += 1
        if kind is None:
            reasons[reason] += 1
        held += module.kernel_bytes()
    return KernelUse(dict(linears), dict(reasons), held)


def say_what_is_decoded(use: KernelUse) -> None:
    """Warns, once for a model, of Linears that no kernel multiplies."""
    if use.reasons:
        total = sum(use.linears.values())
        for reason, count in use.reasons.items():
            warnings.warn(
                f"{count} of {total} packed Linears are decoded at each call, which is slow for few tokens: {reason}",
                stacklevel=3,
            )


def _able(choice: Choice, module: PackedLinear) -> tuple[str | None, str]:
    """Returns what kind of kernel a Linear has, or None and why."""
    if module.offloaded:
        return None, "its codes are offloaded"
    shape = (module.out_features, module.in_features)
    if isinstance(module, LlmInt8Linear):
        kernels, reason = choice.candidates(WEIGHT, INTEGER_PART, shape, _device(module))
        return ("integer" if kernels else None), reason
    found = able(choice, module.weight_spec, module.input_spec, shape, _device(module), module.dtype)
    if found.integer:
        return "integer", ""
    return (" or ".join(k.name for k in found.floating) or None), found.reason


def _device(module: PackedLinear) -> torch.device:
    return next(iter(module.stored.values())).device
