"""Quantizers for what a block's attentions multiply, as the scheme says; part of every solver."""

import torch
from torch import nn

from group_methods.reorder import repeat_heads
from ptq.calibration.statistics import ChannelStatistics
from ptq.config.cache import CACHED
from ptq.config.scheme import attention_specs
from ptq.errors import UserError
from ptq.network.attention import CHILD, AttentionQuantizers, CacheFormats, attach_quantizers, cache_format
from ptq.network.network import Block
from ptq.steps._step import Context
from quantize.modules.simulated import InputQuantizer
from quantize.spec.quant_spec import QuantSpec


def quantize_attention(context: Context, block: Block) -> None:
    """Gives each attention of the block the quantizers of its query, key, value and probabilities.

    Static ranges come from the calibration samples, as they pass through the block before its Linears are quantized.
    """
    for name in context.attentions.get(block.index, []):
        cache, specs = _cache_formats(context, name), attention_specs(context.scheme, name)
        if not specs:
            continue
        if cache is not None:
            specs = {tensor: spec for tensor, spec in specs.items() if tensor not in CACHED}
        module = context.network.model.get_submodule(name)
        seen = _watched(context, block, module) if any(_watches(tensor, spec) for tensor, spec in specs.items()) else {}
        labels = _labels(context, name, specs, seen)
        quantizers = {tensor: _quantizer(tensor, spec, seen, labels) for tensor, spec in specs.items()}
        made = AttentionQuantizers(quantizers, _transforms(module), cache).to(context.stream.device)
        attach_quantizers(module, made)


def _cache_formats(context: Context, name: str) -> CacheFormats | None:
    """Returns how the cache of the attention `name` holds keys and values, or None where the scheme has no cache."""
    cache, specs = context.scheme.cache, attention_specs(context.scheme, name)
    if cache is None:
        return None
    held = {
        tensor: cache_format(cache, specs[tensor], context.network.head_dim) for tensor in CACHED if tensor in specs
    }
    return CacheFormats(held.get("key"), held.get("value"), context.rotary.get(name) if "key" in held else None)


def _transforms(module: nn.Module) -> dict[str, nn.Module]:
    """Returns what a transform lets act on the attention's query and key."""
    standing = getattr(module, CHILD, None)
    return dict(standing.transforms.items()) if isinstance(standing, AttentionQuantizers) else {}


def _watches(tensor: str, spec: QuantSpec) -> bool:
    # Probabilities lie in 0 .. 1 whatever the samples.
    return not spec.dynamic and tensor != "attention_probs"


def _watched(context: Context, block: Block, module: nn.Module) -> dict[str, ChannelStatistics]:
    """Returns statistics of query, key and value (heads * head_dim channels) over the calibration samples."""
    samples = context.samples_of("scheme, static ranges of query, key or value")
    seen: dict[str, ChannelStatistics] = {}

    def watch(tensor: str, x: torch.Tensor) -> None:
        seen.setdefault(tensor, ChannelStatistics.empty(x.shape[-1], x.device)).update(x)

    standing = getattr(module, CHILD, None)
    watcher = AttentionQuantizers({}, _transforms(module))
    watcher.watch = watch
    setattr(module, CHILD, watcher)
    try:
        samples.feed(block, {})
    finally:
        delattr(module, CHILD)
        if standing is not None:
            setattr(module, CHILD, standing)
    return seen


def _labels(
    context: Context, name: str, specs: dict[str, QuantSpec], seen: dict[str, ChannelStatistics]
) -> dict[str, torch.Tensor]:
    """Returns the clusters of the channels of query, key and value where the scheme asks for them, inside each head.

    Query and key are clustered together (RPTQ's R2): their channels meet in the scores. Moving them would have to happen
    after the rotary embedding; a simulation needs no move.
    """
    wanted = [tensor for tensor, spec in specs.items() if spec.granularity == "cluster"]
    if not wanted:
        return {}
    # scikit-learn takes some 100 MiB: only runs that cluster load it.
    from group_methods.kmeans import cluster_heads, max_min_features, share_heads

    if not context.head_clusters:
        raise UserError(
            f"scheme.{wanted[0]}.granularity: 'cluster', but steps.cluster.clusters.heads gives no clusters for {name}: "
            f"add the step, or use granularity tensor"
        )
    head_dim = context.network.head_dim
    figures = {tensor: max_min_features(s.min, s.max, False) for tensor, s in seen.items()}
    repeat = figures["query"].shape[1] // figures["key"].shape[1]
    together = torch.cat([share_heads(figures["query"], head_dim, repeat), figures["key"]])
    shared = cluster_heads(together, head_dim, context.head_clusters).labels
    own = cluster_heads(figures["value"], head_dim, context.head_clusters).labels
    return {"query": repeat_heads(shared, head_dim, repeat) if repeat > 1 else shared, "key": shared, "value": own}


def _quantizer(
    tensor: str, spec: QuantSpec, seen: dict[str, ChannelStatistics], labels: dict[str, torch.Tensor]
) -> InputQuantizer:
    if spec.dynamic:
        return InputQuantizer(spec)
    if tensor == "attention_probs":
        return InputQuantizer(spec, (torch.zeros(1), torch.ones(1)))
    return InputQuantizer(spec, (seen[tensor].min, seen[tensor].max), labels.get(tensor))
