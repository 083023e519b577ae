"""What the model's own checkpoints call its tensors, where transformers renames or stacks them while it reads."""

import torch
import transformers

from ptq.network.experts.linears import Piece
from ptq.network.network import Network


def published_names(network: Network) -> dict[str, str]:
    """Returns the checkpoint's name of the parameters and buffers of blocks with mixtures by full name, of experts' Linears too.

    transformers is asked: it turns numbers in small tensors of those names back into what it would save, and the numbers tell
    which is which. Experts that a checkpoint holds in one tensor have no names of their own there, and are left out.
    """
    model, pieces = network.model, network.pieces
    mixed = tuple(f"{block.name}." for block in network.blocks if block.mixtures)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    plain = [name for name, _ in tensors if name not in pieces and name.startswith(mixed)] if mixed else []
    numbers: list[str] = []
    state: dict[str, torch.Tensor] = {}

    def numbered(names: list[str]) -> torch.Tensor:
        numbers.extend(names)
        return torch.arange(len(numbers) - len(names), len(numbers), dtype=torch.float64, device="cpu")

    for name in plain:
        state[name] = numbered([name])
    for source, names in _by_source(pieces).items():
        first = pieces[names[0]]
        experts = first.shape[0]
        state[source] = numbered(names).view(experts, -1, *(1 for _ in first.shape[2:]))
    found: dict[str, str] = {}
    for published, tensor in transformers.core_model_loading.revert_weight_conversion(model, state).items():
        if tensor.numel() == 1:
            found[numbers[int(tensor.item())]] = published
    return found


def _by_source(pieces: dict[str, Piece]) -> dict[str, list[str]]:
    """Returns the names of the pieces of each tensor, an expert's one after another, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        found.setdefault(piece.source, []).append(name)
    for source, names in found.items():
        found[source] = sorted(names, key=lambda name: (pieces[name].expert, pieces[name].rows[0] or 0))
    return found
