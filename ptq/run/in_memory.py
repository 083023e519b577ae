"""A model that is in memory already: the steps of a recipe on it, in place, without a recipe's files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ptq.calibration.statistics import Provenance
from ptq.calibration.statistics_visitor import StatisticsVisitor
from ptq.config.checking import check_specs
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import check_scheme
from ptq.config.shipped import scheme_named
from ptq.errors import UserError
from ptq.integrations.cache import use_packed_cache
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import build_network
from ptq.network.outside import check_outside
from ptq.report.results import LayerResult
from ptq.run.planning import (
    captures_of_steps,
    check_steps,
    context_of,
    looks_at_samples,
    open_samples,
    plan_all,
    warnings_of,
)
from ptq.run.quantize_visitor import QuantizeVisitor
from ptq.run.tuned.tuning import put_into_blocks, tuner_of
from ptq.steps._proof import Proof
from ptq.steps._registry import build_steps
from ptq.steps._step import STATISTICS, Tuning


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did: the model, one result a Linear, the proof of every transform, and what it had to say."""

    model: Any
    layers: tuple[LayerResult, ...]
    proofs: Mapping[str, Proof]
    notes: tuple[str, ...]


def quantize(
    model: Any,
    scheme: str | SchemeConfig,
    steps: Mapping[str, Mapping[str, Any]],
    ids: torch.Tensor | None,
    batch_size: int = 4,
) -> Quantized:
    """Quantizes a causal language model in place: its Linears become simulated `QuantLinear`.

    Args:
        model: a transformers model with its weights, on any device.
        scheme: the name of a shipped scheme, or a scheme.
        steps: as a recipe has them, such as ``{"smooth": {}, "gptq": {"target": "original"}}``.
        ids: calibration samples, token ids int64 (samples, length); needed by steps and schemes that look at activations.
        batch_size: samples that pass together.

    Raises:
        UserError: for what a run would refuse.
    """
    scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
    check_specs(scheme)
    built = build_steps({name: dict(options) for name, options in steps.items()})
    check_steps(scheme, built)
    wanted = captures_of_steps(scheme, built)
    tuner = tuner_of(built)
    if ids is None and looks_at_samples(scheme, built):
        raise UserError("ids: null, but the steps look at activations: give token ids (samples, length)")
    tokens = _tiny(model) if ids is None else ids
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not len(tokens):
        raise UserError(f"ids: {tuple(tokens.shape)} of {tokens.dtype}: expected int64 (samples, length)")
    device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    network = build_network(model)
    check_scheme(scheme, network.shapes, network.head_dim)
    check_outside(scheme, network)
    stream = BlockStream(network, ResidentWeights(), device)
    notes = warnings_of(scheme, built)
    use_cache, model.config.use_cache = model.config.use_cache, False
    try:
        context = context_of(network, stream, scheme, built, notes.append)
        context.ids, context.batch_size = ids, batch_size
        targets = None if tuner is None else _final_states(stream, tokens, batch_size)
        if STATISTICS in wanted:
            visitor = StatisticsVisitor()
            stream.run([stream.calibration(tokens, batch_size)], visitor, "calibration")
            context.statistics = visitor.result(_provenance(model, tokens))
        plan_all(built, context)
        context.samples = None if ids is None else open_samples(built, context)
        flow = stream.open(tokens[:batch_size], batch_size)
        quantizer = QuantizeVisitor(context, built, flow)
        stream.run([flow] if context.samples is None else [flow, context.samples.flow], quantizer, "quantize")
        if tuner is not None and targets is not None:
            plan = tuner[1].tune(context, Tuning(stream.open(tokens, 1), targets))
            put_into_blocks(tuner[1], plan, context)
        stream.change_outside()
        use_packed_cache(model)
    finally:
        model.config.use_cache = use_cache
        stream.close()
    return Quantized(model, tuple(quantizer.layers), quantizer.proofs, tuple(notes))


def _final_states(stream: BlockStream, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Returns what the last block gives for token ids (samples, length), (samples, length, channels)."""
    flow = stream.open(ids, batch_size)
    stream.run([flow], Nothing(), "baseline")
    return flow.hidden


def _tiny(model: Any) -> torch.Tensor:
    """Returns a few tokens: what is measured on them is not reported."""
    return torch.arange(1, 9)[None] % model.get_input_embeddings().num_embeddings


def _provenance(model: Any, ids: torch.Tensor) -> Provenance:
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    samples, length = ids.shape
    return Provenance(name, None, "", "", "ids", samples, length, str(next(model.parameters()).dtype), "")
