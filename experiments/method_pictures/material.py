"""What the pictures are drawn from: one middle block of SmolLM2-135M, and the tokens that reach it.

Calibration samples and samples after them, which only errors are measured on, are windows of the text that is in every CPython.
"""

import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptq.calibration.samples import Samples
from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.config.schema import SchemeConfig
from ptq.network.block_stream import Flow
from ptq.network.network import Block, weight_of
from ptq.network.replaced import put_back
from ptq.run.planning import context_of, plan_all
from ptq.run.record.journal import Journal
from ptq.run.session import Session, open_session
from ptq.steps._registry import build_steps
from ptq.steps._step import Context
from quantize.modules.simulated import QuantLinear
from quantize.solvers.gptq import Hessian
from quantize.spec.quant_spec import QuantSpec

RECIPE = "smollm2-135m_w8a8"
BLOCK = 14
SAMPLES, HELD_OUT, LENGTH, BATCH = 16, 8, 256, 2
ROW = QuantSpec(4, granularity="channel", symmetric=False)
"""Weights with one range a row."""
GROUP = replace(ROW, granularity="group", group_size=64)
"""Weights with one range for each 64 of a row."""
TOKEN = QuantSpec(4, granularity="token", symmetric=False, dynamic=True)
"""Inputs with one range a token."""


@dataclass(frozen=True)
class Read:
    """One tensor of the block, and the Linears that read it.

    Attributes:
        label: the last parts of their names, such as ``q, k, v``.
        names: their full names.
        x: the tensor on the calibration samples, float32 (tokens, in).
        held_out: the same on the samples after them.
        weight: their weights, one above the other, float32 (out, in).
    """

    label: str
    names: tuple[str, ...]
    x: torch.Tensor
    held_out: torch.Tensor
    weight: torch.Tensor

    @functools.cached_property
    def hessian(self) -> torch.Tensor:
        """H = 2 X^T X / n on the calibration samples, float32 (in, in)."""
        moments = Hessian(self.x.shape[1])
        moments.update(self.x)
        return moments.matrix

    def output_error(self, weight: torch.Tensor, x: torch.Tensor | None = None, by: int | None = None) -> torch.Tensor:
        """Returns the squared error of the outputs on held-out tokens, as a share of the outputs' energy.

        Args:
            weight: what is multiplied, (out, in).
            x: by it, in place of the held-out tokens, (tokens, in).
            by: 0 for the error of each output channel (out,), 1 for that of each token (tokens,), None for the whole.
        """
        exact = self.held_out @ self.weight.t()
        lost = ((self.held_out if x is None else x) @ weight.t() - exact).square()
        return lost.sum() / exact.square().sum() if by is None else lost.sum(by) / exact.square().sum(by)


@dataclass
class Material:
    """The session, and the block as the samples reach it.

    Attributes:
        session: the loaded model and its stream.
        block: number `BLOCK`.
        flow: the calibration samples, hidden states before the block.
        ids: tokens of the calibration samples (samples, length).
        held_out: tokens of the samples after them.
        reads: the block's inputs by label.
    """

    session: Session
    block: Block
    flow: Flow
    ids: torch.Tensor
    held_out: torch.Tensor
    reads: Mapping[str, Read]

    def context(self, scheme: SchemeConfig, steps: Mapping[str, Any]) -> Context:
        """Returns a context of the whole network in which these steps have planned on the calibration samples."""
        built = build_steps({name: dict(options) for name, options in steps.items()})
        session = self.session
        found = context_of(session.network, session.stream, scheme, built, lambda line: None, session.traces)
        found.ids, found.batch_size = self.ids, BATCH
        plan_all(built, found)
        return found

    @contextlib.contextmanager
    def solved(
        self, step: str, options: Mapping[str, Any], weight: QuantSpec
    ) -> Iterator[tuple[dict[str, QuantLinear], dict[str, torch.Tensor]]]:
        """Inside the context the block is as the solver `step` leaves it.

        Gives its Linears by full name, and what the solver has divided their inputs by, (in,), where it has.
        """
        session, scheme = self.session, SchemeConfig(weight=weight)
        [built] = build_steps({step: dict(options)}).values()
        context = context_of(session.network, session.stream, scheme, {step: built}, lambda line: None, session.traces)
        scales: dict[str, torch.Tensor] = {}
        context.batch_size, context.samples = BATCH, Samples(session.stream, self.flow)
        context.rescaled = scales.__setitem__
        with session.stream.at(self.block), put_back(session.network, self.block):
            built.apply(self.block, built.plan(context), context)
            modules = {name: context.module(name) for name in self.block.linears}
            yield {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}, scales


class _Here(Exception):
    """Ends a pass at the block that is looked at."""


class _Stop:
    """A visitor that ends the pass where the samples have reached the block."""

    def enter(self, block: Block) -> None:
        """Raises `_Here` at the block."""
        if block.index == BLOCK:
            raise _Here

    def leave(self, block: Block) -> None:
        """Does nothing."""


@contextlib.contextmanager
def open_material() -> Iterator[Material]:
    """Loads the model, and carries the samples to the block."""
    options = ["data=docs", f"calibration.samples={SAMPLES}", f"calibration.tuning_samples={HELD_OUT}"]
    [job] = compose_jobs(locate(RECIPE), [*options, f"calibration.length={LENGTH}", f"calibration.batch_size={BATCH}"])
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(job.recipe, Journal(pathlib.Path(folder) / "log")) as session,
    ):
        ids, held_out = session.calibration_tokens().ids, session.tuning_tokens().ids
        block = session.network.blocks[BLOCK]
        flows = [session.stream.open(tokens, BATCH) for tokens in (ids, held_out)]
        with contextlib.suppress(_Here):
            session.stream.run(flows, _Stop(), "samples")
        stages = session.traces(False)[BLOCK].stages
        reads = _reads(session, block, flows, stages)
        yield Material(session, block, flows[0], ids, held_out, reads)


def _reads(session: Session, block: Block, flows: Sequence[Flow], stages: Sequence[tuple[str, ...]]) -> dict[str, Read]:
    """Returns the block's inputs by label, of Linears that read one tensor together."""
    kept: dict[tuple[int, tuple[str, ...]], list[torch.Tensor]] = {}
    with session.stream.at(block):
        for i, flow in enumerate(flows):
            watchers = {}
            for stage in stages:
                rows = kept.setdefault((i, stage), [])
                watchers[stage[0]] = lambda x, tokens, rows=rows: rows.append(x.flatten(0, -2).float().clone())
            Samples(session.stream, flow).feed(block, watchers)
        found = {}
        for stage in stages:
            label = ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in stage)
            weight = torch.cat([weight_of(block.linears[name]).detach().float() for name in stage])
            found[label] = Read(label, stage, torch.cat(kept[0, stage]), torch.cat(kept[1, stage]), weight)
    return found
