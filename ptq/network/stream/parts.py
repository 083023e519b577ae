"""A flow whose batches pass in parts, for gradients of a batch that are summed part by part."""

from dataclasses import replace

import torch

from ptq.network.block_stream import BlockStream, Flow
from ptq.network.stream.calls import shared


@torch.no_grad()
def in_parts(stream: BlockStream, flow: Flow, size: int) -> Flow:
    """Returns the flow's samples as they pass `size` at a time: its hidden states, and how the model calls its blocks for so few.

    What experts see of them is not counted. Where a batch is no more than a part it is the flow itself.

    Args:
        stream: that has opened the flow; what lies outside the blocks is as it was then.
        flow: of whole samples, from position 0.
        size: samples of a part.

    Raises:
        ValueError: for a size that does not divide the flow's batches.
    """
    if flow.batch_size % size:
        raise ValueError(f"size: {size} does not divide a batch of {flow.batch_size}")
    if size == flow.batch_size:
        return flow
    parts = Flow(flow.ids, size, flow.hidden)
    with stream.hold_outside():
        for _, rows in parts.slices():
            calls = stream.record(flow.ids[rows])[1]
            parts.calls.append(shared(parts.calls[-1] if parts.calls else None, calls))
    if flow.experts is not None:
        parts.experts = replace(flow.experts, routed={}, seen={}, own=range(0))
    return parts
