"""Maps of what Linears read, planned one block at a time from the moments of calibration samples: what wush and affine share."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ptq.calibration.samples import Samples
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError
from ptq.network.block_stream import Flow
from ptq.network.network import Block, weight_of
from ptq.ranks.reduction import by_cost, done_by, merged, total_of
from ptq.ranks.sample_sum import SampleSum, by_sample
from ptq.ranks.world import Message, World
from ptq.steps._solving import Rows, specs_of
from ptq.steps._step import INPUT, WEIGHT_INPUT, Context, StepPlan, Transform
from quantize.modules.online import OnlineShared, attach_input, online_input
from quantize.modules.online_maps import OnlineBlocks, OnlineKronecker
from quantize.solvers.gptq import Hessian
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.rounding_cost import RoundingCost

OnlineMap = OnlineBlocks | OnlineKronecker
KEPT_VALUES = 1 << 18
"""Numbers of one input on which the cost of rounding is measured, about."""


@dataclass(frozen=True)
class Reading:
    """One tensor that Linears of a block read.

    Attributes:
        names: their full names.
        hessian: its second moments X^T X / tokens, float32 (in, in).
        weight: their weights, one above the other, float32 (out, in).
        spec: format of the tensor.
        cost: of rounding it and the weights.
    """

    names: tuple[str, ...]
    hessian: torch.Tensor
    weight: torch.Tensor
    spec: QuantSpec
    cost: RoundingCost


class InputMaps(Transform):
    """Lets a map act online on every tensor that the scheme rounds and Linears read, and its inverse on their columns.

    All Linears that read one tensor share the map. A Linear whose input something else acts on already is left alone.
    """

    acts: ClassVar[frozenset[str]] = frozenset({INPUT, WEIGHT_INPUT})
    by_block: ClassVar[bool] = True
    outdates: ClassVar[bool] = True
    title: ClassVar[str]
    """The step's name, for messages."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs nothing that is not planned with. `UserError` where the scheme leaves all inputs alone."""
        if not tensor_specs(scheme, "input"):
            raise UserError(
                f"steps.{self.title}: scheme.input is null, and a map of inputs serves their rounding: ~steps.{self.title}"
            )
        return frozenset()

    def choose(self, reading: Reading) -> tuple[OnlineMap, str]:
        """Returns the map of one tensor, and a few words on it for the log. Raises `ValueError` where there is none."""
        raise TypeError(f"{type(self).__name__} does not say which map it takes")

    def plan(self, context: Context) -> StepPlan:
        """Chooses every map, on the network as the steps before leave it."""
        flow = self.looks_at(context)
        search = _Search(self, context, Samples(context.stream, flow))
        context.show(search, flow, self.title)
        return StepPlan(search.tensors, stale=True)

    def looks_at(self, context: Context) -> Flow:
        """All calibration samples, shared by the ranks: the moments are theirs."""
        return context.drawn(f"steps.{self.title}", shared=True)

    def plan_block(self, block: Block, context: Context, flow: Flow | None) -> StepPlan:
        """Chooses the maps of the block's inputs."""
        if flow is None:
            raise TypeError(f"{self.title} looks at samples")
        search = _Search(self, context, Samples(context.stream, flow))
        search.enter(block)
        return StepPlan(search.tensors, stale=True)

    @torch.no_grad()
    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Attaches the block's maps, and gives the Linears' columns the inverse."""
        for stage in context.stages(block):
            for names in _alike(context, stage):
                made = _built(plan.tensors, names[0])
                if made is None:
                    continue
                linears = [context.module(name) for name in names]
                weights = [weight_of(linear) for linear in linears]
                shared = OnlineShared(made.to(weights[0].device))
                # Together: the map is factorised once.
                mapped = made.inverse_weight(torch.cat(weights)).split([len(weight) for weight in weights])
                for linear, weight, own in zip(linears, weights, mapped, strict=True):
                    weight.copy_(own)
                    attach_input(linear, shared)


def tensors_of(name: str, made: OnlineMap) -> dict[str, torch.Tensor]:
    """Returns a map as a plan holds it, under the name of the first Linear that reads behind it."""
    return {f"{name}|{key}": tensor for key, tensor in made.state_dict().items()}


def _built(tensors: Mapping[str, torch.Tensor], name: str) -> OnlineMap | None:
    """Returns the map of these `tensors` for the Linear `name`, or None where it has none."""
    if (matrices := tensors.get(f"{name}|matrices")) is not None:
        return OnlineBlocks(matrices)
    if f"{name}|left" in tensors:
        return OnlineKronecker(*(tensors[f"{name}|{key}"] for key in ("left", "right", "diagonal")))
    return None


def _alike(context: Context, stage: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the Linears of a stage whose inputs are rounded, those of one format together."""
    of: dict[QuantSpec, list[str]] = {}
    for name in stage:
        spec = specs_of(context, name).input
        if spec is not None:
            of.setdefault(spec, []).append(name)
    return [tuple(names) for names in of.values()]


class _Search:
    """The visitor that chooses the maps of a block."""

    def __init__(self, step: InputMaps, context: Context, samples: Samples):
        self.step, self.context, self.samples = step, context, samples
        self.tensors: dict[str, torch.Tensor] = {}

    def enter(self, block: Block) -> None:
        """Lets the samples pass once, then chooses: each rank some of the maps."""
        read = [names for stage in self.context.stages(block) for names in _alike(self.context, stage)]
        taken = [names for names in read if online_input(self.context.module(names[0])) is not None]
        for names in taken:
            self.context.note(f"{self.step.title}: {names[0]} left alone: another step acts on its input online")
        read = [names for names in read if names not in taken]
        weights = {names: [weight_of(self.context.module(name)) for name in names] for names in read}
        seen = [_Moments(w[0], self.samples) for w in weights.values()]
        watchers = {names[0]: tensor.see for names, tensor in zip(read, seen, strict=True)}
        if watchers:
            # Outputs that are kept spare the stream a second pass; where hidden states are on disk nothing may be kept of all samples.
            if self.samples.stream.hidden_states == "memory":
                self.samples.carry(block, watchers)
            else:
                self.samples.feed(block, watchers, shared=True)
        world = self.samples.stream.world
        owners = by_cost([float(tensor.width) ** 3 for tensor in seen], world.size)
        for tensor, owner in zip(seen, owners, strict=True):
            tensor.reduce(world, owner)

        def work(number: int) -> Message:
            names, tensor = read[number], seen[number]
            if tensor.hessian is None or not len(tensor.rows):
                return Message(f"{self.step.title}: {names[0]} left alone: no calibration token reaches it")
            weight = torch.cat([w.detach().float() for w in weights[names]])
            return self._chosen(names, tensor.rows.float(), tensor.hessian.matrix / 2, weight)

        for message in done_by(world, owners, work):
            if message.facts is not None:
                self.context.note(message.facts)
            self.tensors |= {key: tensor.to(self.context.stream.device) for key, tensor in message.tensors.items()}

    def leave(self, block: Block) -> None:
        """Does nothing."""

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the block's maps."""
        own = {key: tensor for key, tensor in self.tensors.items() if key.partition("|")[0] in block.linears}
        StepPlan(own).save(path)

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up what `write` has written."""
        self.tensors |= StepPlan.load(path, self.context.stream.device).tensors

    def _chosen(
        self, names: tuple[str, ...], rows: torch.Tensor, hessian: torch.Tensor, weight: torch.Tensor
    ) -> Message:
        """Returns the map's tensors, and what the log says of it."""
        specs = specs_of(self.context, names[0])
        if specs.input is None:
            return Message()
        try:
            cost = RoundingCost.of(rows, hessian, weight, specs.input, specs.weight)
            made, words = self.step.choose(Reading(names, hessian, weight, specs.input, cost))
        except ValueError as error:
            return Message(f"{self.step.title}: {names[0]} left alone: {error}")
        return Message(f"{self.step.title}: {', '.join(names)}: {words}", tensors_of(names[0], made))


class _Moments:
    """What passes of a tensor that Linears read: second moments, and some rows.

    Attributes:
        width: its channels.
        hessian: 2 X^T X / tokens of all ranks' samples, where `reduce` has put it; None where no token has passed.
        rows: those that were kept (tokens, channels), likewise.
    """

    def __init__(self, weight: torch.Tensor, samples: Samples):
        self.width, self._device, self._length = weight.shape[1], weight.device, samples.flow.ids.shape[1]
        empty = partial(Hessian, self.width, self._device)
        self._moments: SampleSum[Hessian] = SampleSum(samples.flow.leaf, empty, merged, Hessian.clear)
        self._rows = Rows(KEPT_VALUES, samples.tokens)
        self.hessian: Hessian | None = None
        self.rows = torch.zeros(0, self.width, device=self._device)

    def see(self, x: torch.Tensor, tokens: slice) -> None:
        """Adds a batch, a sample at a time, so that sums do not depend on the batch size; a `Watcher`."""
        if not x.numel():
            return
        flat = x.reshape(-1, x.shape[-1])
        for sample, rows in by_sample(x, slice(tokens.start // self._length, tokens.stop // self._length)):
            self._moments.of(sample).update(flat[rows])
        self._rows.add(x, tokens)

    def reduce(self, world: World, to: int) -> None:
        """Adds up what all ranks have seen, on rank `to`."""
        self.hessian = total_of(world, self._moments, Hessian.from_state, self._device, to)
        own = self.rows if self._rows.empty else self._rows.kept()
        found = [
            message.tensors["rows"].to(self._device) for message in world.gather(Message(tensors={"rows": own}), to)
        ]
        self.rows = torch.cat(found) if found else self.rows
