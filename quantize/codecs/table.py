"""A codebook's levels on the device that decodes by them, copied there once and not at every call."""

from collections.abc import Sequence

import torch


class Table:
    """Float32 levels (entries,), held by device."""

    def __init__(self, levels: Sequence[float]):
        self._levels = tuple(levels)
        self._held: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Returns the levels on `device`; not to be written into."""
        held = self._held.get(device)
        if held is None:
            # An ordinary tensor also where inference mode is on by now: autograd may see it later.
            with torch.inference_mode(False):
                held = torch.tensor(self._levels, device=device)
            if type(held) is torch.Tensor:  # a tracer's stand-in is its own, and goes with it
                self._held[device] = held
        return held
