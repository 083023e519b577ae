"""What the sensitivity predicts, measured: each Linear quantized alone, and the KL divergence of the whole model to its baseline."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ptq.allocation.sensitivity import Forward
from ptq.evaluation.token_comparison import compare_tokens
from ptq.network.block_stream import Flow
from ptq.network.network import Block, replaced_forward, weight_of
from ptq.run.session import Session
from quantize.kernels.matmul import linear
from quantize.spec.quant_spec import QuantSpec


@torch.no_grad()
def one_at_a_time(session: Session, forward: Forward, formats: Mapping[str, QuantSpec]) -> dict[str, dict[str, float]]:
    """Returns by Linear and format the mean KL divergence, nats a token, of the model with that one weight quantized: to
    nearest, or by the solver of `forward`.

    Every block's Linears start from what reaches that block, which is kept, and go through the later blocks together: with
    n blocks of k Linears n k passes through half of the network for each format.
    """
    stream, blocks = session.stream, session.network.blocks
    found: dict[str, dict[str, float]] = {}
    quantize = forward.quantize(formats)
    with session.journal.phase("one at a time"):
        for block in blocks:
            with forward.context.shown(block):
                variants = {
                    (name, form): _quantized(session, forward, block, name, weight)
                    for name, weights in quantize(block).items()
                    for form, weight in weights.items()
                }
            for later in blocks[block.index + 1 :]:
                with forward.context.shown(later):
                    for flow in variants.values():
                        stream.step(flow, later)
            with stream.head() as head:
                for (name, form), flow in variants.items():
                    compared = compare_tokens(
                        (head, head), forward.flow.hidden, flow.hidden, flow.ids, session.recipe.evaluation.chunk
                    )
                    found.setdefault(name, {})[form] = float(compared.kl.mean())
            stream.progress("one at a time", block.index + 1, len(blocks))
    return found


def rank_correlation(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]], form: str
) -> float:
    """Returns Spearman's rank correlation over the Linears of `second` of what two measures say of one format, nan for one value alone."""
    from scipy.stats import spearmanr

    return float(
        spearmanr([first[name][form] for name in second], [costs[form] for costs in second.values()]).statistic
    )


def _quantized(session: Session, forward: Forward, block: Block, name: str, weight: torch.Tensor) -> Flow:
    """Returns the samples behind `block`, one of whose weights is another."""
    module = forward.context.module(name)
    other = weight.to(weight_of(module).dtype)
    flow = replace(forward.flow, hidden=forward.inputs[block.index].clone(), finite={}, ahead={})
    with replaced_forward([module], lambda index: lambda x: linear(x, other, module.bias)):
        session.stream.step(flow, block)
    return flow
