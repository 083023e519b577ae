"""Tokens of the residual stream as its norms give them to their readers, without the gains: what a rotation of the stream is chosen on."""

import pathlib
from collections.abc import Callable

import torch

from ptq.calibration.samples import Samples
from ptq.network.links import Link
from ptq.network.network import Block, weight_of
from ptq.network.norms import gain_offset
from ptq.steps._solving import Rows
from ptq.steps._step import Context, StepPlan

STREAM_VALUES = 1 << 22
"""Numbers that are kept of the whole stream, about."""


class StreamRows:
    """The visitor that keeps some tokens of what every norm of the stream reads.

    Args:
        context: what the step sees.
        samples: that pass.
        links: gives a block's links from norms that read the stream.
        centred: whether the norms take the mean out first.
    """

    def __init__(self, context: Context, samples: Samples, links: Callable[[Block], list[Link]], centred: bool):
        self._context, self._samples, self._links, self._centred = context, samples, links, centred
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def rows(self) -> torch.Tensor:
        """The tokens (tokens, width), float32, each of unit mean square times a weight.

        The weight's square is what an error of the norm's output costs its readers: their |W|^2 over the mean square of what
        they give.
        """
        return torch.cat(list(self._kept.values()))

    def enter(self, block: Block) -> None:
        """Lets the samples pass once."""
        links = self._links(block)
        values = STREAM_VALUES // max(1, len(links) * len(self._context.network.blocks))
        rows = {link.producer: Rows(values, self._samples.tokens) for link in links}
        self._samples.feed(block, {name: kept.add for name, kept in rows.items()})
        for link in links:
            if not rows[link.producer].empty:
                self._kept[f"{block.name}|{link.producer}"] = self._weighed(link, rows[link.producer].kept().float())

    def leave(self, block: Block) -> None:
        """Does nothing."""

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the block's tokens."""
        StepPlan({key: rows for key, rows in self._kept.items() if key.startswith(f"{block.name}|")}).save(path)

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up what `write` has written."""
        self._kept |= StepPlan.load(path, self._context.stream.device).tensors

    def _weighed(self, link: Link, rows: torch.Tensor) -> torch.Tensor:
        if self._centred:
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        norm = self._context.module(link.producer)
        gain = norm.weight.float() + (gain_offset(norm) or 0.0)
        weights = [weight_of(self._context.module(name)).float() * gain for name in link.readers]
        given = sum(float((rows @ weight.t()).square().sum()) for weight in weights) / len(rows)
        cost = sum(float(weight.square().sum()) for weight in weights) / max(given, torch.finfo(torch.float32).tiny)
        return rows * cost**0.5
