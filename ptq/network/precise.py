"""A block in float32 or float64, whatever its model runs in: where links, sums and transforms are proved.

In fp16 or bf16 rounding hides what is to be told: an error of one part in four would pass as rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.network.block_stream import BlockStream, Flow
from ptq.network.network import Block, first_tensor
from quantize.modules.packed import PackedLinear
from quantize.modules.simulated import QuantLinear

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ULPS = 256
"""Units in the last place of float32 that summing in another order may cost."""
TELLING = 1e-3
"""A tolerance above this tells nothing: the residual stream is so much greater than what the block adds to it that float32
rounds that away, and float64 is needed.
"""

Call = Callable[[torch.Tensor], torch.Tensor]
"""Gives a block's output, wide, for hidden states (batch, tokens, channels) of any floating type."""


@contextmanager
def precise_block(
    stream: BlockStream,
    flow: Flow,
    block: Block,
    dtype: torch.dtype = torch.float32,
    batch: int = 0,
    keep: bool = False,
) -> Iterator[Call]:
    """Inside the context the block computes in `dtype`: its parameters and buffers are widened copies, in place of the own.

    Widening is exact. On leaving the block has its own tensors back; a model that is as wide already is left alone.

    Args:
        stream: brings the model's device.
        flow: how the model calls the block; the arguments of batch number `batch` are widened too.
        block: its weights are in memory.
        dtype: float32 or float64.
        batch: which batch's call.
        keep: whether what was done to the wide copies is kept, rounded to the block's own types.

    Raises:
        OverflowError: with `keep`, naming the first tensor that is finite in `dtype` and not in its own type.
    """
    recorded = stream.recorded(flow, block, batch)

    def call(hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = (_widened(part, dtype) for part in (recorded.args, recorded.kwargs))
        hidden = _widened(hidden.to(stream.device), dtype)
        return first_tensor(block.module(hidden, *args, **kwargs))

    with _wide_module(block.module, dtype, keep):
        yield call


@contextmanager
def precise_module(module: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside the context `module` has its parameters and buffers in `dtype`; what is done to them there is lost."""
    with _wide_module(module, dtype, False):
        yield


def telling_dtype(stream: BlockStream, flow: Flow, block: Block, hidden: torch.Tensor) -> torch.dtype:
    """Returns float32 where its rounding leaves enough to tell what the block does to `hidden`, else float64.

    A block that cannot be computed in float64 (some devices) stays in float32, with its tolerance.
    """
    return hidden.dtype if hidden.dtype == torch.float64 else telling_output(stream, flow, block, hidden).dtype


def telling_output(stream: BlockStream, flow: Flow, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what the block gives for `hidden`, in the type that `telling_dtype` names."""

    def output_in(dtype: torch.dtype) -> torch.Tensor:
        with precise_block(stream, flow, block, dtype) as call:
            return call(hidden)

    if hidden.dtype == torch.float64:
        return output_in(torch.float64)
    output = output_in(torch.float32)
    if tolerance_of(hidden.float(), output) <= TELLING:
        return output
    try:
        return output_in(torch.float64)
    except (RuntimeError, TypeError):
        return output


def change_error(hidden: torch.Tensor, reference: torch.Tensor, output: torch.Tensor) -> float:
    """Returns |output - reference| / |reference - hidden|: the error relative to what the block adds to its input.

    NaN where either output is not finite, which no tolerance allows.
    """
    return float((output - reference).double().norm()) / _change(hidden, reference)


def tolerance_of(hidden: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the `change_error` that rounding alone may cause: `ULPS` of float32, of the greater of sum and change.

    With a `reference` in float64 of the change alone: the sum is not rounded, but norms and softmax are float32 in any model.
    """
    narrow = reference.dtype != torch.float64
    share = float(reference.double().norm()) / _change(hidden, reference) if narrow else 1.0
    return ULPS * torch.finfo(torch.float32).eps * max(1.0, share)


def _change(hidden: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns |reference - hidden|, at least float32's least number: a block may add nothing."""
    return max(float((reference - hidden).double().norm()), torch.finfo(torch.float32).tiny)


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """Returns `value` with every narrower floating-point tensor in it in `dtype`; other objects as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if _narrower(value, dtype) else value
    if type(value) in {tuple, list}:
        return type(value)(_widened(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _widened(item, dtype) for key, item in value.items()}
    return value


def _narrower(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype in FLOATS and tensor.dtype.itemsize < dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """Where a tensor hangs: one of a module's dictionaries, and its name there and in full."""

    owner: dict[str, Any]
    name: str
    full: str


def _places(module: nn.Module) -> Iterator[tuple[_Place, torch.Tensor]]:
    """Yields every parameter and buffer that is computed with; what codes and scales are stored in is not."""
    for prefix, inner in module.named_modules():
        stored = inner.stored_names if isinstance(inner, PackedLinear | QuantLinear) else ()
        owners: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
        for owner in owners:
            for name, tensor in list(owner.items()):
                if tensor is not None and name not in stored:
                    yield _Place(owner, name, f"{prefix}.{name}" if prefix else name), tensor


@contextmanager
def _wide_module(module: nn.Module, dtype: torch.dtype, keep: bool) -> Iterator[None]:
    wide: dict[int, torch.Tensor] = {}
    own: dict[int, torch.Tensor] = {}
    before: list[tuple[_Place, torch.Tensor]] = []
    for place, tensor in _places(module):
        if tensor.is_meta or not _narrower(tensor, dtype):
            continue
        if id(tensor) not in wide:  # tied ones stay tied
            copy = tensor.detach().to(dtype)
            wide[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
            own[id(wide[id(tensor)])] = tensor
        before.append((place, tensor))
        place.owner[place.name] = wide[id(tensor)]
    try:
        yield
        if keep and before:
            _narrow(module, dtype, own, {place.full: tensor.dtype for place, tensor in before})
    finally:
        for place, tensor in before:
            # What a step has put there instead stays there, in the narrow type by now.
            if place.owner.get(place.name) is wide[id(tensor)]:
                place.owner[place.name] = tensor


@torch.no_grad()
def _narrow(
    module: nn.Module, dtype: torch.dtype, own: dict[int, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> None:
    """Writes the wide tensors into those that they stand for, and narrows what has come beside them."""
    usual = next(iter(dtypes.values()))
    new: dict[int, torch.Tensor] = {}
    for place, tensor in _places(module):
        mine = own.get(id(tensor))
        if mine is None and tensor.dtype != dtype:
            continue
        target = dtypes.get(place.full, usual) if mine is None else mine.dtype
        narrow = new.setdefault(id(tensor), tensor.to(target))
        if not bool((torch.isfinite(narrow) | ~torch.isfinite(tensor)).all()):
            raise OverflowError(f"{place.full} no longer fits into {target}")
        if mine is not None and mine.shape == narrow.shape:
            mine.copy_(narrow)
        else:
            kept = nn.Parameter(narrow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else narrow
            place.owner[place.name] = kept
