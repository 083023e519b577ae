"""Taking statistics: hooks on the Linears of a block while the calibration samples pass through it."""

import pathlib
from typing import Any

import torch
from torch import nn

from ptq.calibration.statistics import UNDER_WAY, ChannelStatistics, Provenance, Statistics, WeightStatistics
from ptq.errors import UserError
from ptq.network.block_stream import BlockStream, Flow, passing
from ptq.network.network import Block, weight_of
from ptq.ranks.sample_sum import SampleSum, by_sample
from ptq.ranks.world import Message, World


class StatisticsVisitor:
    """Gathers statistics of the Linears and gates of each block by forward pre-hooks, while samples pass through it.

    Linears that read the very same tensor (q, k, v) share one computation.

    Args:
        device: where statistics that are taken up from a file go: that of the arithmetic. Weights may be on no device by then.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.inputs: dict[str, ChannelStatistics] = {}
        self.weights: dict[str, WeightStatistics] = {}
        self._handles: list[Any] = []
        self._owner: dict[str, str] = {}
        self._sums: dict[str, SampleSum[ChannelStatistics]] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    def enter(self, block: Block) -> None:
        """Attaches a hook to every Linear and gate of the block and takes its weight's statistics."""
        for name, module in block.readers.items():
            weight = weight_of(module)
            self.weights[name] = WeightStatistics.of(weight)
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))

    def leave(self, block: Block) -> None:
        """Removes the hooks. Raises `UserError` naming the first module whose input was not finite.

        A Linear that no token reached has its weight's statistics only.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None
        for name in self._gathered(block):
            if not bool(self.inputs[name].is_finite()):
                raise UserError(
                    f"{name}: its input holds NaN or inf on the calibration data: try model.dtype=float32 or check the weights"
                )

    def reduce(self, block: Block, world: World) -> None:
        """Adds up what the ranks have seen of a block that the samples have passed, in the order of the samples."""
        if world.size == 1:
            return
        own = {name: self._sums[name].nodes() for name in block.readers if name in self._sums}
        owners = {name: self._owner[name] for name in block.readers if name in self._owner}
        tensors = {
            f"{name}|{level}|{index}|{key}": tensor
            for name, nodes in own.items()
            for level, index, statistics in nodes
            for key, tensor in statistics.state().items()
        }
        for name in own:
            del self._sums[name]
        for message in world.gather(Message(owners, tensors)):
            found: dict[tuple[str, int, int], dict[str, torch.Tensor]] = {}
            for full, tensor in message.tensors.items():
                name, *place, key = full.rsplit("|", 3)
                found.setdefault((name, int(place[0]), int(place[1])), {})[key] = tensor.to(self.device)
            for (name, level, index), state in found.items():
                node = level, index, ChannelStatistics.from_state(state)
                self._sums.setdefault(name, _sum(1, len(state["min"]), self.device)).add([node])
            for name, owner in message.facts.items():
                if owner == name or name not in self._owner:
                    self._owner[name] = owner

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the statistics of a finished block."""
        self._gathered(block)
        self.of_block(block).save(path)

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up what `write` has written."""
        if not block.readers:
            return
        found = Statistics.load(path, torch.device(self.device))
        self.inputs |= found.inputs
        self.weights |= found.weights

    def _gathered(self, block: Block) -> list[str]:
        """Returns the block's Linears that tokens have reached, each with the statistics of the tensor that it reads."""
        names = [name for name in block.readers if name in self._owner]
        for name in names:
            if (total := self._sums.pop(name).total() if name in self._sums else None) is not None:
                self.inputs[name] = total
        for name in names:
            self.inputs[name] = self.inputs[self._owner[name]]
        return names

    def of_block(self, block: Block) -> Statistics:
        """Returns what was gathered of a block that the samples have passed."""
        return self.result(UNDER_WAY).of_linears(block.readers)

    def result(self, provenance: Provenance) -> Statistics:
        """Returns what was gathered."""
        return Statistics(self.inputs, self.weights, provenance)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if not x.numel():  # an expert that is called for no token
                return
            if self._last is not None and self._last[0] is x:
                self._owner.setdefault(name, self._last[1])
                if self._owner[name] == self._last[1]:
                    return
            self._last = (x, name)
            self._owner[name] = name
            flow, batch = passing()
            if name not in self._sums:
                self._sums[name] = _sum(flow.leaf, x.shape[-1], x.device)
            rows = x.detach().reshape(-1, x.shape[-1])
            for sample, of in by_sample(x, batch):
                self._sums[name].of(sample).update(rows[of])

        return hook


def shared_statistics(stream: BlockStream, ids: torch.Tensor, batch_size: int) -> tuple[StatisticsVisitor, Flow]:
    """Returns what takes statistics of calibration samples, ids (samples, length), and these as they pass, shared by the ranks."""
    visitor, flow = StatisticsVisitor(stream.device), stream.calibration(ids, batch_size, shared=True)
    flow.passed = lambda block: visitor.reduce(block, stream.world)
    return visitor, flow


def _sum(leaf: int, channels: int, device: torch.device | str) -> SampleSum[ChannelStatistics]:
    return SampleSum(leaf, lambda: ChannelStatistics.empty(channels, device), ChannelStatistics.merged)
