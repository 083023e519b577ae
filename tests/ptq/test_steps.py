"""Steps: transforms preserve what a network computes, on every architecture; solvers and their order."""

import pytest
import torch

from ptq.config import SchemeConfig
from ptq.errors import UserError
from ptq.links import trace_links
from ptq.network import build_network
from ptq.statistics import ChannelStatistics, Provenance, Statistics, StatisticsVisitor, WeightStatistics
from ptq.steps import cluster, smooth
from ptq.steps.base import Plan, Samples
from ptq.steps.registry import build_steps
from ptq.stream import BlockStream
from ptq.testing import random_tiny
from ptq.weights import ResidentWeights

ARCHITECTURES = (
    "opt", "llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "phi", "bloom", "falcon", "gpt2", "mixtral",
)  # fmt: skip
SMOOTHED = set(ARCHITECTURES)


class Prepared:
    """A tiny model with random, non-trivial norm gains and biases, its statistics, and a plan over it."""

    def __init__(self, architecture: str):
        self.model = random_tiny(architecture)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 1:
                spread = 0.3 if name.endswith("weight") else 0.1
                parameter.data += spread * torch.randn(parameter.shape, generator=generator)
        self.network = build_network(self.model)
        self.stream = BlockStream(self.network, ResidentWeights(), torch.device("cpu"))
        self.ids = torch.randint(3, 60, (4, 12), generator=generator)
        self.plan = Plan(self.network, self.stream, SchemeConfig(), trace_links(self.network, self.stream))
        self.plan.statistics = self.statistics()
        self.plan.samples = Samples(self.stream, self.stream.open(self.ids, 2))

    def statistics(self) -> Statistics:
        visitor = StatisticsVisitor()
        self.stream.run([self.stream.open(self.ids, 2)], visitor)
        return visitor.result(Provenance("tiny", None, "", "", "", 4, 12, "fp32", ""))

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, use_cache=False).logits

    def apply(self, step) -> None:
        step.plan(self.plan)
        for block in self.network.blocks:
            step.apply(block)


def steps():
    """The transforms, with the options that move most."""
    return {
        "smooth": smooth.Step(smooth.Options(alpha=0.7)),
        "cluster": cluster.Step(cluster.Options(clusters=cluster.Counts(residual=5, out=3, mlp=6))),
        "rptq": cluster.Step(cluster.Options(method="max_min_kmeans", clusters=cluster.Counts(4, 2, 5))),
    }


@pytest.mark.parametrize("name", steps())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_transform_preserves_the_logits_of_every_architecture(architecture, name):
    prepared = Prepared(architecture)
    before = prepared.logits()
    weights = {n: p.clone() for n, p in prepared.model.named_parameters()}
    prepared.apply(steps()[name])
    changed = sum(not torch.equal(weights.get(n, p * 0), p) for n, p in prepared.model.named_parameters())
    assert changed >= 2 * len(prepared.network.blocks)
    torch.testing.assert_close(prepared.logits(), before, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", steps())
@pytest.mark.parametrize("architecture", ["opt", "llama", "gemma3", "phi", "gpt2"])
def test_statistics_rewritten_by_a_transform_equal_those_taken_again(architecture, name):
    prepared = Prepared(architecture)
    prepared.apply(steps()[name])
    rewritten, again = prepared.plan.statistics, prepared.statistics()
    for linear, inputs in again.inputs.items():
        mine: ChannelStatistics = rewritten.inputs[linear]
        for figure in ("min", "max", "mean", "std"):
            torch.testing.assert_close(getattr(mine, figure), getattr(inputs, figure), rtol=1e-3, atol=1e-4)
        ours: WeightStatistics = rewritten.weights[linear]
        for figure in ("in_min", "in_max", "in_std", "out_min", "out_max", "out_std"):
            expected = getattr(again.weights[linear], figure)
            torch.testing.assert_close(getattr(ours, figure), expected, rtol=1e-4, atol=1e-5)


def test_a_solver_before_a_transform_is_refused_by_name():
    with pytest.raises(UserError, match="steps.smooth: a transform after the solver rtn"):
        build_steps({"rtn": {}, "smooth": {}})
    with pytest.raises(UserError, match="steps.gptq: a second solver after rtn"):
        build_steps({"rtn": {}, "gptq": {}})
