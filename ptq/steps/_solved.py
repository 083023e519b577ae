"""What a rank has chosen for some Linears, as the other ranks get it: codes and scales, no weights in floating point."""

from collections.abc import Mapping

import torch

from ptq.ranks.world import Message
from ptq.steps._solving import Solved
from quantize.grid.affine import Grid


def told(solved: Mapping[str, Solved], notes: list[str]) -> Message:
    """Returns what was chosen, by full name of a Linear, and lines for the run's log, as a message."""
    linears: dict[str, dict[str, object]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, chosen in solved.items():
        parts: Mapping[str, torch.Tensor]
        if isinstance(chosen, tuple):
            codes, grid = chosen
            parts = {"codes": codes, "scale": grid.scale}
            parts |= {} if grid.zero_point is None else {"zero_point": grid.zero_point}
            linears[name] = {"low": grid.low, "high": grid.high, "parts": list(parts)}
        else:
            parts = chosen
            linears[name] = {"low": None, "high": None, "parts": list(parts)}
        tensors |= {f"{name}|{part}": tensor for part, tensor in parts.items()}
    return Message({"linears": linears, "notes": notes}, tensors)


def heard(message: Message, device: torch.device) -> tuple[dict[str, Solved], list[str]]:
    """Returns what `told` was given, its tensors on `device`."""
    found: dict[str, Solved] = {}
    for name, facts in message.facts["linears"].items():
        parts = {part: message.tensors[f"{name}|{part}"].to(device) for part in facts["parts"]}
        if facts["low"] is None:
            found[name] = parts
        else:
            grid = Grid(parts["scale"], parts.get("zero_point"), facts["low"], facts["high"])
            found[name] = parts["codes"], grid
    return found, message.facts["notes"]
