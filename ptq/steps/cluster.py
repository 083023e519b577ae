"""Clusters of input channels, one static scale each: max-std k-means over the residual stream, or RPTQ (Yuan et al. 2023)."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from group_methods.kmeans import KINDS as FEATURES
from group_methods.kmeans import (
    SOURCES,
    ChannelRange,
    cluster,
    cluster_heads,
    max_min_features,
    max_std_features,
    share_heads,
)
from group_methods.reorder import order_of, permute_columns, permute_rows, repeat_heads
from ptq.calibration.statistics import Statistics
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError, nearest
from ptq.network.links import Link
from ptq.network.network import Block, replace_module, weight_of
from ptq.steps._step import STATISTICS, TRANSFORM, Plan
from ptq.steps.smooth import kind_of

METHODS = ("max_std_kmeans", "max_min_kmeans")


@dataclass(frozen=True)
class Counts:
    """Greatest number of clusters of one tensor; 0 leaves that kind of tensor without clusters.

    Attributes:
        residual: of what a norm writes (the notes' ``qkvfc_cluster``; RPTQ's R1 and R4).
        out: of each head of what the attention's output projection reads (R3).
        mlp: of what the MLP's last Linear reads (R5).
        heads: of each head's query, key and value, where the scheme gives them granularity cluster (R2).
    """

    residual: int = 8
    out: int = 4
    mlp: int = 8
    heads: int = 4


@dataclass(frozen=True)
class Options:
    """How channels are grouped.

    Attributes:
        method: ``max_std_kmeans`` (one grouping of the residual channels for the whole network, by the figures of inputs
            and weights) or ``max_min_kmeans`` (RPTQ: each link by itself, by max and min of its activation).
        clusters: how many.
        features: which of ``max``, ``min`` and ``std`` max-std k-means looks at.
        sources: of what: ``input``, ``weight``.
        standardise: whether every feature counts alike; otherwise those with the greatest ranges decide.
        reorder: move the channels so that a cluster is contiguous, as kernels want it. A simulation gives the same
            numbers without.
        seed: of k-means' starts.
    """

    method: str = "max_std_kmeans"
    clusters: Counts = field(default_factory=Counts)
    features: tuple[str, ...] = FEATURES
    sources: tuple[str, ...] = SOURCES
    standardise: bool = False
    reorder: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check("method", (self.method,), METHODS)
        _check("features", self.features, FEATURES)
        _check("sources", self.sources, SOURCES)
        for name, count in dataclasses.asdict(self.clusters).items():
            if count < 0:
                raise UserError(
                    f"steps.cluster.clusters.{name}: {count} is below 0: use 0 for none, or a number such as 8"
                )


class Reordered(nn.Module):
    """A norm that writes its channels in another order."""

    order: torch.Tensor

    def __init__(self, inner: nn.Module, order: torch.Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the norm gives for `x` (..., channels), gathered."""
        y: torch.Tensor = self.inner(x).index_select(-1, self.order)
        return y


class Step:
    """Groups the input channels of Linears, and moves them so that those of a group are contiguous."""

    kind: ClassVar[str] = TRANSFORM

    def __init__(self, options: Options):
        self.options = options
        self._moves: dict[int, list[_Move]] = {}

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the channel statistics of every link."""
        return frozenset({STATISTICS})

    def plan(self, plan: Plan) -> None:
        """Groups the channels of every link; writes ``plan.labels``, and rewrites the statistics in the new order."""
        self._plan = plan
        plan.head_clusters = self.options.clusters.heads
        if plan.statistics is None:
            raise UserError("steps.cluster: needs calibration statistics, and none were taken")
        shared = self._residual(plan.statistics)
        for block in plan.network.blocks:
            self._moves[block.index] = []
            for link in plan.links(block):
                labels = self._labels(link, plan.statistics, shared)
                if labels is not None:
                    self._take(block, link, labels, plan.statistics)

    def apply(self, block: Block) -> None:
        """Moves the block's channels, in place."""
        if not self.options.reorder:
            return
        model = self._plan.network.model
        with torch.no_grad():
            for move in self._moves[block.index]:
                if move.link.kind == "norm":
                    norm = model.get_submodule(move.link.producer)
                    replace_module(model, move.link.producer, Reordered(norm, move.written))
                for name in move.writers:
                    producer = model.get_submodule(name)
                    weight_of(producer).copy_(permute_rows(weight_of(producer), move.written))
                    if isinstance(producer.bias, torch.Tensor):
                        producer.bias.copy_(permute_rows(producer.bias, move.written))
                for name in move.link.readers:
                    weight = weight_of(model.get_submodule(name))
                    weight.copy_(permute_columns(weight, move.read))

    def _residual(self, statistics: Statistics) -> torch.Tensor | None:
        """Returns the grouping of the residual channels that all norm links share, or None where each has its own."""
        count = self.options.clusters.residual
        if self.options.method != "max_std_kmeans" or count == 0:
            return None
        links = [x for block in self._plan.network.blocks for x in self._plan.links(block) if x.kind == "norm"]
        # A norm inside the attention (on heads) has another width than the residual stream.
        width = self._plan.network.model.config.get_text_config().hidden_size
        readers = [name for link in links for name in link.readers if len(statistics.inputs[name].min) == width]
        if not readers:
            return None
        return cluster(
            self._features(readers, statistics), count, self.options.seed, extent=_extent(readers, statistics)
        ).labels

    def _labels(self, link: Link, statistics: Statistics, shared: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the clusters of the channels that the link's producer writes, or None for no clusters."""
        kind, counts, seed = kind_of(link, self._plan.roles), self.options.clusters, self.options.seed
        reader = link.readers[0]
        if kind == "norm":
            if shared is not None and len(shared) == len(statistics.inputs[reader].min):
                return shared
            if counts.residual == 0:
                return None
            return cluster(
                self._features([reader], statistics), counts.residual, seed, extent=_extent([reader], statistics)
            ).labels
        count = {"v_o": counts.out, "up_down": counts.mlp, "fc1_fc2": counts.mlp}.get(kind, 0)
        if count == 0:
            return None
        features, extent = self._features([reader], statistics), _extent([reader], statistics)
        if kind != "v_o":
            return cluster(features, count, seed, extent=extent).labels
        head_dim = link.head_dim
        features = share_heads(features, head_dim, link.repeat)
        extent = share_heads(extent[None], head_dim, link.repeat).amax(0)
        return cluster_heads(features, head_dim, count, seed=seed, extent=extent).labels

    def _features(self, readers: list[str], statistics: Statistics) -> torch.Tensor:
        o = self.options
        if o.method == "max_min_kmeans":
            figures = statistics.inputs[readers[0]]
            return max_min_features(figures.min, figures.max, o.standardise)
        inputs = [ChannelRange(x.min, x.max, x.std) for x in (statistics.inputs[name] for name in readers)]
        weights = [ChannelRange(x.in_min, x.in_max, x.in_std) for x in (statistics.weights[name] for name in readers)]
        return max_std_features(inputs, weights, o.standardise, o.features, o.sources)

    def _take(self, block: Block, link: Link, labels: torch.Tensor, statistics: Statistics) -> None:
        """Notes the labels of the link's readers and, where channels move, their order."""
        repeated = labels if link.repeat == 1 else repeat_heads(labels, link.head_dim, link.repeat)
        if not self.options.reorder:
            self._plan.labels.update(dict.fromkeys(link.readers, repeated))
            return
        move = _Move(link, self._writers(block, link), order_of(labels), order_of(repeated))
        self._moves[block.index].append(move)
        for name in link.readers:
            self._plan.labels[name] = repeated[move.read]
            statistics.inputs[name] = statistics.inputs[name].reordered(move.read)
            statistics.weights[name] = statistics.weights[name].reordered_inputs(move.read)
        for name in move.writers:
            statistics.weights[name] = statistics.weights[name].reordered_outputs(move.written)

    def _writers(self, block: Block, link: Link) -> tuple[str, ...]:
        """Returns the Linears whose rows move: the producer, and the gate that is multiplied with it channel by channel."""
        producer = link.source or link.producer
        if link.kind == "norm":
            return ()
        if kind_of(link, self._plan.roles) != "up_down":
            return (producer,)
        stage = next((s for s in self._plan.stages(block) if producer in s), (producer,))
        beside = [name for name in stage if name.rpartition(".")[0] == producer.rpartition(".")[0]]
        return tuple(beside) if len(beside) == 2 else (producer,)


@dataclass(frozen=True)
class _Move:
    """The new order of the channels that a link's producer writes, and of those that its readers read."""

    link: Link
    writers: tuple[str, ...]
    written: torch.Tensor
    read: torch.Tensor


def _extent(readers: list[str], statistics: Statistics) -> torch.Tensor:
    """Returns the greatest magnitude of each channel over the inputs of `readers`, (channels,)."""
    return torch.stack([statistics.inputs[name].absmax for name in readers]).amax(0)


def _check(field: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    if not values:
        raise UserError(f"steps.cluster.{field}: empty: expected some of {', '.join(choices)}")
    for value in values:
        if value not in choices:
            raise UserError(
                f"steps.cluster.{field}: {value!r} is not valid: expected {', '.join(choices)}{nearest(value, choices)}"
            )
