"""What a rotation of the residual stream does outside the blocks: where the stream begins (embeddings, or a norm behind them) and where
it ends (the final norm, the head).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ptq.errors import UserError
from ptq.network.basis import Basis
from ptq.network.network import replace_module
from ptq.network.norms import gain_offset
from ptq.network.outside import set_weight, untie
from ptq.network.replaced import hooked
from ptq.steps._step import Context
from quantize.modules.hadamard import OnlineHadamard, TurnedNorm
from quantize.transforms.residual import center_embedding, fold_gain, rotate_reader


@torch.no_grad()
def first_norms(context: Context, width: int) -> tuple[str, ...]:
    """Returns the full names of the norms that come before the first block, as BLOOM's does behind its embedding: what they give is the
    residual stream, of `width` channels. What lies outside the blocks is in memory as it was.
    """
    norms = _norms(context, width)
    if len(norms) < 2:
        return ()
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *call: called.append(name)

    with hooked(module.register_forward_hook(note(name)) for name, module in norms.items()):
        context.stream.record(torch.zeros(1, 2, dtype=torch.int64))
    return tuple(called)


def last_norm(context: Context, width: int, first: Sequence[str]) -> tuple[str, Any]:
    """Returns the norm before the head, and its full name.

    Args:
        context: what the step sees.
        width: channels of the stream.
        first: what `first_norms` gave.

    Raises:
        UserError: where not just one can be it, or no head is.
    """
    norms = {name: module for name, module in _norms(context, width).items() if name not in first}
    if len(norms) != 1 or context.network.model.get_output_embeddings() is None:
        raise UserError(
            f"steps.rotate.residual: {len(norms)} norms of the stream's width lie behind the blocks, and one was expected: "
            "use residual=false"
        )
    return next(iter(norms.items()))


def turn_ends(context: Context, basis: Basis, online: Callable[[], OnlineHadamard]) -> None:
    """Turns what the stream begins with, and the head; the final norm's gain goes into the head, which is no longer tied.

    Args:
        context: what the step sees; what lies outside the blocks is in memory.
        basis: of the stream. The gains of its `first` norms come after their own division, so what they give is turned online.
        online: makes the transform that does to a stream what `basis` does.
    """
    network, model = context.network, context.network.model
    head, width = model.get_output_embeddings(), len(basis.matrix)
    name, norm = last_norm(context, width, basis.first)
    weight, bias = fold_gain(head.weight, head.bias, norm.weight, gain_offset(norm) or 0.0, getattr(norm, "bias", None))
    set_weight(head, "weight", rotate_reader(weight, basis.matrix))
    if bias is not None:
        set_weight(head, "bias", bias)
    for module in [] if basis.first else [model.get_submodule(name) for name in network.outside]:
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            rows = center_embedding(module.weight) if basis.centred else module.weight
            set_weight(module, "weight", rotate_reader(rows, basis.matrix))
    for place in basis.first:
        turned = TurnedNorm(model.get_submodule(place), online().to(basis.matrix.device), basis.centred)
        replace_module(model, place, turned)
    neutral(model, name, norm, basis.centred)
    untie(model)


def neutral(model: nn.Module, name: str, norm: nn.Module, centred: bool) -> None:
    """Leaves a norm without gain and bias; one that took the mean out, which the writers do now, becomes an RMSNorm."""
    weight = norm.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} has no gain")
    if centred:
        eps = getattr(norm, "eps", None)
        plain = nn.RMSNorm(len(weight), eps, elementwise_affine=False)
        replace_module(model, name, plain)
    else:
        set_weight(norm, "weight", torch.full_like(weight, 1.0 - (gain_offset(norm) or 0.0)))


def _norms(context: Context, width: int) -> dict[str, Any]:
    """Returns the norms outside the blocks that have so many channels, by full name."""
    modules = {name: context.network.model.get_submodule(name) for name in context.network.outside}
    return {name: module for name, module in modules.items() if _is_norm(module, width)}


def _is_norm(module: nn.Module, width: int) -> bool:
    weight: Any = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.shape == (width,)
