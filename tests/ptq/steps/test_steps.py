"""Steps: transforms preserve what a network computes, on every architecture; solvers and their order."""

import numpy as np
import pytest
import torch

from ptq.calibration.samples import Samples
from ptq.calibration.statistics import ChannelStatistics, Provenance, Statistics, WeightStatistics
from ptq.calibration.statistics_visitor import StatisticsVisitor
from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.links import trace_links
from ptq.network.network import build_network, weight_of
from ptq.steps._proof import prove
from ptq.steps._registry import build_steps
from ptq.steps._step import Context, StepPlan, Transform
from ptq.steps.solvers import rtn
from ptq.steps.transforms import cluster, smooth
from ptq.testing import ARCHITECTURES, random_tiny
from quantize.spec.quant_spec import QuantSpec

SMOOTHED = set(ARCHITECTURES)
TENSOR = {"weight": QuantSpec(bits=4), "input": QuantSpec(bits=4, granularity="tensor", symmetric=False)}


class Prepared:
    """A tiny model with random, non-trivial norm gains and biases, its statistics, and a plan over it."""

    def __init__(self, architecture: str, scheme: SchemeConfig | None = None, dtype: torch.dtype = torch.float32):
        self.model = random_tiny(architecture).to(dtype)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 1:
                spread = 0.3 if name.endswith("weight") else 0.1
                parameter.data += spread * torch.randn(parameter.shape, generator=generator)
        self.network = build_network(self.model)
        self.stream = BlockStream(self.network, ResidentWeights(), torch.device("cpu"))
        self.ids = torch.randint(3, 60, (4, 12), generator=generator)
        traces = trace_links(self.network, self.stream)
        self.context = Context(self.network, self.stream, scheme or SchemeConfig(), traces, self.statistics())
        self.context.ids, self.context.batch_size = self.ids, 2
        self.context.samples = Samples(self.stream, self.stream.open(self.ids, 2))

    def statistics(self) -> Statistics:
        visitor = StatisticsVisitor()
        self.stream.run([self.stream.open(self.ids, 2)], visitor)
        return visitor.result(Provenance("tiny", None, "", "", "", 4, 12, "fp32", ""))

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, use_cache=False).logits

    def plan(self, step) -> StepPlan:
        plan = step.plan(self.context)
        self.context.plans[type(step).__module__] = plan
        self.context.statistics = plan.statistics or self.context.statistics
        return plan

    def apply(self, step) -> None:
        plan = self.plan(step)
        for block in self.network.blocks:
            step.apply(block, plan, self.context)


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


@pytest.mark.parametrize("method", cluster.METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_in_clusters_gives_the_same_numbers_without_reordering(architecture, method):
    scheme = SchemeConfig(
        weight=QuantSpec(bits=4, granularity="cluster"),
        input=QuantSpec(bits=4, granularity="cluster", symmetric=False),
        # Where q, k and v are one Linear there is no link from v to o, and nothing clusters what o reads.
        overrides=tuple(
            Override(f"*.{name}", TENSOR) for name in ("attention.dense", "self_attention.dense", "attn.c_proj")
        ),
    )
    logits = {}
    for reorder in (True, False):
        # In float64 no sum's order can turn a value that lies between two codes to the other one.
        prepared = Prepared(architecture, scheme, torch.float64)
        counts = cluster.Counts(residual=5, out=3, mlp=6)
        prepared.apply(cluster.Step(cluster.Options(method=method, clusters=counts, reorder=reorder)))
        before = prepared.logits()
        prepared.apply(rtn.Step(rtn.Options()))
        logits[reorder] = prepared.logits()
        assert not torch.allclose(logits[reorder], before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", steps())
@pytest.mark.parametrize("architecture", ["opt", "llama", "gemma3", "phi", "gpt2"])
def test_statistics_rewritten_by_a_transform_equal_those_taken_again(architecture, name):
    prepared = Prepared(architecture)
    prepared.apply(steps()[name])
    rewritten, again = prepared.context.statistics, prepared.statistics()
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


def test_smoothing_opt_is_the_published_formula_worked_out_on_two_layers():
    prepared = Prepared("opt")
    statistics, model, alpha = prepared.context.statistics, prepared.model, 0.7
    expected = {}
    for layer in (0, 1):
        block = f"model.decoder.layers.{layer}"
        for norm, readers in {
            "self_attn_layer_norm": [f"self_attn.{p}_proj" for p in "qkv"],
            "final_layer_norm": ["fc1"],
        }.items():
            weights = [model.get_submodule(f"{block}.{r}").weight.detach().double().numpy() for r in readers]
            columns = np.max([np.abs(w).max(0) for w in weights], axis=0)
            x = statistics.inputs[f"{block}.{readers[0]}"]
            activation = np.maximum(np.abs(x.min.numpy()), np.abs(x.max.numpy())).astype(np.float64)
            scale = np.maximum(activation, 1e-5) ** alpha / np.maximum(columns, 1e-5) ** (1 - alpha)
            gain, bias = (
                getattr(model.get_submodule(f"{block}.{norm}"), n).detach().numpy() for n in ("weight", "bias")
            )
            expected[f"{block}.{norm}.weight"], expected[f"{block}.{norm}.bias"] = gain / scale, bias / scale
            for reader, weight in zip(readers, weights, strict=True):
                expected[f"{block}.{reader}.weight"] = weight * scale
    prepared.apply(smooth.Step(smooth.Options(alpha=alpha, links=("norm",))))
    found = dict(model.named_parameters())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].detach().numpy(), value, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("architecture", "function"), [("gpt_neox", "GELU"), ("phi", "GELU")])
def test_an_activation_that_does_not_commute_with_scales_is_refused_with_the_reason(architecture, function):
    prepared = Prepared(architecture)
    with pytest.raises(UserError, match=f"(?s)fc1_fc2 of .*{function}.* does not commute with positive scales"):
        prepared.apply(smooth.Step(smooth.Options(links=("fc1_fc2",))))


def test_relu_is_smoothed_and_what_cannot_be_is_noted_where_nothing_was_asked_for():
    notes = []
    for architecture in ("opt", "gpt_neox"):
        prepared = Prepared(architecture)
        prepared.context.note = notes.append
        before = prepared.model.get_submodule(
            prepared.context.links(prepared.network.blocks[0])[0].readers[0]
        ).weight.clone()
        prepared.apply(smooth.Step(smooth.Options()))
        after = prepared.model.get_submodule(prepared.context.links(prepared.network.blocks[0])[0].readers[0]).weight
        assert not torch.equal(before, after)
    assert all("gpt_neox" in note and "left alone" in note for note in notes)
    assert len(notes) == len(prepared.network.blocks)


class Broken(Transform):
    """A transform that scales a norm and forgets its readers."""

    def apply(self, block, plan, context):
        with torch.no_grad():
            context.module(context.links(block)[0].producer).weight.mul_(1.001)


def test_a_transform_that_changes_what_a_block_computes_is_stopped_by_name():
    prepared = Prepared("llama")
    step, flow = Broken(None), prepared.context.samples.flow
    block = prepared.network.blocks[0]
    with pytest.raises(UserError, match=rf"steps.broken: changes the output of {block.name} by \d.*~steps.broken"):
        prove("broken", step, StepPlan(), block, prepared.context, flow, flow.hidden[:2])


class Zeroing(Transform):
    """A step that takes a share, its options, of every Linear's weight away."""

    def apply(self, block, plan, context):
        with torch.no_grad():
            for module in block.linears.values():
                weight_of(module).mul_(1 - self.options)


def proved(name, step, prepared, plan=None, index=0):
    """Proves the step on a block of a prepared model, on the first batch as it comes out of the embedding."""
    flow = prepared.context.samples.flow
    block = prepared.network.blocks[index]
    return prove(name, step, plan or StepPlan(), block, prepared.context, flow, flow.hidden[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_step_that_zeroes_a_block_or_a_hundredth_of_it_is_stopped_in_every_type(dtype, share):
    prepared = Prepared("llama", dtype=dtype)
    with pytest.raises(UserError, match="changes the output"):
        proved("zeroing", Zeroing(share), prepared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_smoothing_is_proved_to_float32_in_16_bit_models_too(architecture, dtype):
    prepared = Prepared(architecture, dtype=dtype)
    step = smooth.Step(smooth.Options(alpha=0.7))
    plan = prepared.plan(step)
    before = {name: p.dtype for name, p in prepared.model.named_parameters()}
    for index in range(len(prepared.network.blocks)):
        error, tolerance = proved("smooth", step, prepared, plan, index)
        assert error <= tolerance < 2e-3
    assert {name: p.dtype for name, p in prepared.model.named_parameters()} == before


class Far(Transform):
    """A step that scales a norm by a million, and what reads it back."""

    def apply(self, block, plan, context):
        link = context.links(block)[0]
        with torch.no_grad():
            context.module(link.producer).weight.mul_(1e6)
            for name in link.readers:
                weight_of(context.module(name)).div_(1e6)


def test_a_scale_that_a_16_bit_weight_cannot_take_is_refused_with_the_weights_name():
    prepared = Prepared("llama", dtype=torch.float16)
    block = prepared.network.blocks[0]
    message = rf"steps.far: {block.name}\.input_layernorm\.weight no longer fits into torch.float16: use model.dtype"
    with pytest.raises(UserError, match=message):
        proved("far", Far(None), prepared)


def test_a_block_that_gives_nan_before_a_step_is_not_laid_at_its_door():
    prepared = Prepared("llama")
    block = prepared.network.blocks[0]
    block.module.mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="gives NaN or inf before the step"):
        proved("zeroing", Zeroing(0), prepared)


@pytest.mark.parametrize("architecture", ["opt", "llama", "gemma3"])
def test_a_proof_of_a_true_transform_stays_within_rounding(architecture):
    prepared = Prepared(architecture)
    step = smooth.Step(smooth.Options())
    plan, flow = prepared.plan(step), prepared.context.samples.flow
    error, tolerance = prove("smooth", step, plan, prepared.network.blocks[0], prepared.context, flow, flow.hidden[:2])
    assert 0 <= error <= tolerance < 1e-3


def test_a_searched_alpha_preserves_the_logits_too():
    prepared = Prepared("llama")
    prepared.context.scheme = SchemeConfig(
        weight=QuantSpec(bits=4), input=QuantSpec(bits=4, granularity="token", dynamic=True)
    )
    before = prepared.logits()
    step = smooth.Step(smooth.Options(search=True, candidates=(0.2, 0.5, 0.8)))
    prepared.apply(step)
    torch.testing.assert_close(prepared.logits(), before, rtol=1e-3, atol=2e-4)


def test_a_search_under_clusters_groups_channels_whose_ranges_differ_by_less_than_a_factor_of_two():
    magnitudes = torch.exp(2 * torch.randn(500, generator=torch.Generator().manual_seed(2)))
    labels = smooth.alike(magnitudes)
    assert labels.unique().equal(torch.arange(int(labels.max()) + 1))
    for label in labels.unique():
        members = magnitudes[labels == label]
        assert members.max() < 2 * members.min()
    assert smooth.alike(torch.zeros(4)).equal(torch.zeros(4, dtype=torch.int64))
    assert smooth.alike(torch.tensor([0.0, 1.0, 1.5, 1e30])).tolist() == [0, 0, 0, 1]


def test_a_search_under_clusters_leaves_activations_more_of_their_ranges_than_under_one_range_a_tensor():
    def migrated(granularity: str) -> float:
        prepared = Prepared("opt")
        # One channel far out: with a range of its own it need not move into the weights.
        for block in prepared.network.blocks:
            block.module.self_attn_layer_norm.weight.data[3] *= 60
        prepared.context.statistics = prepared.statistics()
        four = QuantSpec(bits=4, granularity=granularity, symmetric=False)
        prepared.context.scheme = SchemeConfig(weight=QuantSpec(bits=4, granularity="channel"), input=four)
        prepared.plan(smooth.Step(smooth.Options(search=True, links=("norm",))))
        ranges = [s.absmax for n, s in prepared.context.statistics.inputs.items() if n.endswith("q_proj")]
        return sum(float(r.max() / r.median()) for r in ranges)

    assert migrated("cluster") > 2 * migrated("tensor")
