"""Clusters of input channels, one static scale each: max-std k-means over the residual stream, or RPTQ (Yuan et al. 2023)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

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
from ptq.config.options import option, seed_option
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError, nearest
from ptq.network.links import Link
from ptq.network.network import Block, replace_module, weight_of
from ptq.steps._step import STATISTICS, WEIGHT_INPUT, WEIGHT_OUTPUT, Context, StepPlan, Transform
from ptq.steps.transforms.smooth import key_of, kind_of
from quantize.modules.reordered import Reordered

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

    method: str = option("max_std_kmeans", choices=METHODS)
    clusters: Counts = field(default_factory=Counts)
    features: tuple[str, ...] = option(FEATURES, choices=FEATURES, only_with={"method": ("max_std_kmeans",)})
    sources: tuple[str, ...] = option(SOURCES, choices=SOURCES, only_with={"method": ("max_std_kmeans",)})
    standardise: bool = False
    reorder: bool = True
    seed: int = seed_option()

    def __post_init__(self) -> None:
        _check("method", (self.method,), METHODS)
        _check("features", self.features, FEATURES)
        _check("sources", self.sources, SOURCES)
        for name, count in dataclasses.asdict(self.clusters).items():
            if count < 0:
                raise UserError(
                    f"steps.cluster.clusters.{name}: {count} is below 0: use 0 for none, or a number such as 8"
                )


class Step(Transform):
    """Groups the input channels of Linears, and moves them so that those of a group are contiguous."""

    acts: ClassVar[frozenset[str]] = frozenset({WEIGHT_INPUT, WEIGHT_OUTPUT})

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the channel statistics of every link."""
        return frozenset({STATISTICS})

    def plan(self, context: Context) -> StepPlan:
        """Groups the channels of every link, and rewrites the statistics in the new order."""
        if context.statistics is None:
            raise UserError("steps.cluster: needs calibration statistics, and none were taken")
        grouping = _Grouping(self.options, context, context.statistics.copy())
        grouping.run()
        return StepPlan(
            grouping.orders,
            {"moves": grouping.moves},
            grouping.labels,
            self.options.clusters.heads,
            statistics=grouping.statistics,
        )

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Moves the block's channels, in place."""
        with torch.no_grad():
            for move in plan.figures["moves"].get(str(block.index), []):
                written, read = (plan.tensors[f"{move['key']}|{side}"] for side in ("written", "read"))
                if move["norm"]:
                    norm = context.module(move["producer"])
                    replace_module(context.network.model, move["producer"], Reordered(norm, written))
                for name in move["writers"]:
                    producer = context.module(name)
                    weight_of(producer).copy_(permute_rows(weight_of(producer), written))
                    if isinstance(producer.bias, torch.Tensor):
                        producer.bias.copy_(permute_rows(producer.bias, written))
                for name in move["readers"]:
                    weight = weight_of(context.module(name))
                    weight.copy_(permute_columns(weight, read))


class _Grouping:
    """Finds the groups; `moves` says by block which channels move, `orders` where to, `labels` who is in which group."""

    def __init__(self, options: Options, context: Context, statistics: Statistics):
        self.options, self.context, self.statistics = options, context, statistics
        self.orders: dict[str, torch.Tensor] = {}
        self.labels: dict[str, torch.Tensor] = {}
        self.moves: dict[str, list[dict[str, Any]]] = {}

    def run(self) -> None:
        """Groups the channels of every link of the network."""
        shared = self._residual()
        for block in self.context.network.blocks:
            for link in self.context.links(block):
                labels = self._group(link, shared)
                if labels is not None:
                    self._take(block, link, labels)

    def _residual(self) -> torch.Tensor | None:
        """Returns the grouping of the residual channels that all norm links share, or None where each has its own."""
        count = self.options.clusters.residual
        if self.options.method != "max_std_kmeans" or count == 0:
            return None
        context, statistics = self.context, self.statistics
        links = [x for block in context.network.blocks for x in context.links(block) if x.kind == "norm"]
        # A norm inside the attention (on heads) has another width than the residual stream.
        width = context.network.model.config.get_text_config().hidden_size
        names = [name for link in links for name in link.readers if name in statistics.inputs]
        readers = [name for name in names if len(statistics.inputs[name].min) == width]
        if not readers:
            return None
        return cluster(self._features(readers), count, self.options.seed, extent=_extent(readers, statistics)).labels

    def _group(self, link: Link, shared: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the clusters of the channels that the link's producer writes, or None for no clusters."""
        kind, counts, seed = kind_of(link, self.context.roles), self.options.clusters, self.options.seed
        reader, statistics = link.readers[0], self.statistics
        if reader not in statistics.inputs:
            self.context.note(f"cluster: {link.producer} left alone: no calibration token reaches {reader}")
            return None
        if kind == "norm":
            if shared is not None and len(shared) == len(statistics.inputs[reader].min):
                return shared
            if counts.residual == 0:
                return None
            extent = _extent([reader], statistics)
            return cluster(self._features([reader]), counts.residual, seed, extent=extent).labels
        count = {"v_o": counts.out, "up_down": counts.mlp, "fc1_fc2": counts.mlp}.get(kind, 0)
        if count == 0:
            return None
        features, extent = self._features([reader]), _extent([reader], statistics)
        if kind != "v_o":
            return cluster(features, count, seed, extent=extent).labels
        head_dim = link.head_dim
        features = share_heads(features, head_dim, link.repeat)
        extent = share_heads(extent[None], head_dim, link.repeat).amax(0)
        return cluster_heads(features, head_dim, count, seed=seed, extent=extent).labels

    def _features(self, readers: list[str]) -> torch.Tensor:
        o, statistics = self.options, self.statistics
        if o.method == "max_min_kmeans":
            figures = statistics.inputs[readers[0]]
            return max_min_features(figures.min, figures.max, o.standardise)
        inputs = [ChannelRange(x.min, x.max, x.std) for x in (statistics.inputs[name] for name in readers)]
        weights = [ChannelRange(x.in_min, x.in_max, x.in_std) for x in (statistics.weights[name] for name in readers)]
        return max_std_features(inputs, weights, o.standardise, o.features, o.sources)

    def _take(self, block: Block, link: Link, labels: torch.Tensor) -> None:
        """Notes the labels of the link's readers and, where channels move, their order."""
        repeated = labels if link.repeat == 1 else repeat_heads(labels, link.head_dim, link.repeat)
        if not self.options.reorder:
            self.labels.update(dict.fromkeys(link.readers, repeated))
            return
        inputs, weights = self.statistics.inputs, self.statistics.weights
        key, writers, written, read = key_of(link), self._writers(block, link), order_of(labels), order_of(repeated)
        move = {"key": key, "producer": link.producer, "norm": link.kind == "norm"}
        move |= {"writers": list(writers), "readers": list(link.readers)}
        self.moves.setdefault(str(block.index), []).append(move)
        self.orders |= {f"{key}|written": written, f"{key}|read": read}
        for name in link.readers:
            self.labels[name] = repeated[read]
            if name in inputs:
                inputs[name] = inputs[name].reordered(read)
            weights[name] = weights[name].reordered_inputs(read)
        for name in writers:
            weights[name] = weights[name].reordered_outputs(written)

    def _writers(self, block: Block, link: Link) -> tuple[str, ...]:
        """Returns the Linears whose rows move: the producer, and the gate that is multiplied with it channel by channel."""
        producer = link.source or link.producer
        if link.kind == "norm":
            return ()
        if kind_of(link, self.context.roles) != "up_down":
            return (producer,)
        stage = next((s for s in self.context.stages(block) if producer in s), (producer,))
        beside = [name for name in stage if name.rpartition(".")[0] == producer.rpartition(".")[0]]
        return tuple(beside) if len(beside) == 2 else (producer,)


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
