"""Learned solvers on tiny trained models: they lose less than rounding, keep the best, and say what they cannot do."""

import csv
import re

import pytest
import torch

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.steps._learning import trainable
from ptq.steps._solving import BlockInputs
from ptq.steps._step import StepPlan
from ptq.steps.solvers import omniquant
from quantize.spec.quant_spec import QuantSpec
from tests.ptq.steps.test_solvers import figures
from tests.ptq.steps.test_steps import Prepared

SCHEME = {"weight": {"bits": 2, "granularity": "group", "group_size": 32, "symmetric": False}}
TOKEN = {"bits": 6, "granularity": "token", "dynamic": True}
CALIBRATION = {"samples": 16, "length": 64, "batch_size": 2}
FEW = {"steps": 24}


# Two bits leave clips little to learn.
@pytest.mark.parametrize(("step", "most", "precision"), [
    ("autoround", 0.6, "float32"), ("omniquant", 0.97, "float32"), ("autoround", 0.6, "bfloat16"), ("omniquant", 0.97, "bfloat16"),
])  # fmt: skip
def test_a_learned_solver_loses_less_than_rounding_and_the_log_says_how_the_held_out_error_fell(
    tmp_path, tiny_llama, step, most, precision
):
    plain, _ = figures(tmp_path, tiny_llama, SCHEME, {"rtn": {}})
    options = {**FEW, "precision": precision}
    learned, log = figures(tmp_path, tiny_llama, SCHEME, {step: options}, calibration=CALIBRATION)
    assert learned["kl_mean"] < most * plain["kl_mean"]
    errors = re.findall(rf"{step}: model.layers.\d+: held out error (\S+) -> (\S+) \(step \d+\)", log)
    assert errors and all(float(after) < float(before) for before, after in errors)


@pytest.mark.parametrize("step", ["autoround", "omniquant"])
def test_no_steps_at_all_are_rounding_to_nearest_and_a_rate_that_does_harm_is_not_kept(tmp_path, tiny_llama, step):
    plain, _ = figures(tmp_path, tiny_llama, SCHEME, {"rtn": {}})
    none, _ = figures(tmp_path, tiny_llama, SCHEME, {step: {"steps": 0}}, calibration=CALIBRATION)
    wild, _ = figures(tmp_path, tiny_llama, SCHEME, {step: {"steps": 4, "rate": 50.0}}, calibration=CALIBRATION)
    if step == "autoround":
        assert none["quantized_perplexity"] == pytest.approx(plain["quantized_perplexity"], rel=2e-3)
    # Clips start a little open: sigmoid(4) of the range.
    assert wild["kl_mean"] <= 1.3 * none["kl_mean"]


def test_scales_learned_behind_norms_are_in_the_norms_and_the_output_errors_are_of_the_rescaled_inputs(
    tmp_path, tiny_llama_outliers
):
    scheme = {**SCHEME, "input": TOKEN}
    found = {}
    for rate in (0.0, 0.02):
        options = {**FEW, "scale_rate": rate}
        figures_, _ = figures(tmp_path, tiny_llama_outliers, scheme, {"omniquant": options}, calibration=CALIBRATION)
        found[rate] = figures_["kl_mean"]
    assert found[0.02] < found[0.0]
    for path in (tmp_path / "outputs").rglob("layers.csv"):
        errors = [float(row["output_error"]) for row in csv.DictReader(path.open())]
        assert max(errors) < 1.5


@torch.no_grad()
def test_scales_learned_behind_norms_are_once_in_the_weights_that_are_stored():
    prepared = Prepared("llama", SchemeConfig(weight=QuantSpec(bits=3)))
    block, scales = prepared.network.blocks[0], {}
    prepared.context.rescaled = scales.__setitem__
    before = {name: module.weight.clone() for name, module in block.linears.items()}
    options = omniquant.Options(steps=8, scale_rate=0.05)
    omniquant.Step(options).apply(block, StepPlan(), prepared.context)
    assert scales and max(float((scale - 1).abs().max()) for scale in scales.values()) > 0.1
    for name, scale in scales.items():
        stored = prepared.context.module(name).weight
        off = [float((stored - before[name] * scale**times).norm()) for times in (0, 1, 2)]
        assert min(off) == off[1]


def test_learning_to_the_original_output_goes_through_the_blocks(tmp_path, tiny_opt):
    options = {**FEW, "target": "original"}
    plain, _ = figures(tmp_path, tiny_opt, SCHEME, {"rtn": {}})
    learned, _ = figures(tmp_path, tiny_opt, SCHEME, {"autoround": options}, calibration=CALIBRATION)
    assert learned["kl_mean"] < 0.6 * plain["kl_mean"]


@pytest.mark.parametrize(
    ("step", "options", "scheme", "words"),
    [
        ("autoround", {"steps": -1}, SCHEME, "steps.autoround.steps: -1"),
        ("autoround", {"target": "orignal"}, SCHEME, "steps.autoround.target: 'orignal' .*original"),
        ("omniquant", {"held_out": 1}, SCHEME, "steps.omniquant.held_out: 1"),
        ("omniquant", {}, {**SCHEME, "input": {"bits": 8, "granularity": "tensor"}}, "steps.omniquant.scale_rate=0"),
        ("autoround", {}, {"weight": {"format": "nf4", "bits": 4, "granularity": "group", "group_size": 64}}, "'nf4' has no ranges"),
    ],
)  # fmt: skip
def test_what_learned_solvers_cannot_do_is_refused(tmp_path, tiny_llama, step, options, scheme, words):
    with pytest.raises(UserError, match=words):
        figures(tmp_path, tiny_llama, scheme, {step: options}, calibration=CALIBRATION)


@pytest.mark.parametrize("step", ["autoround", "omniquant"])
def test_too_few_pairs_are_refused_with_how_many_would_do(tmp_path, tiny_llama, step):
    few = {"samples": 4, "length": 32, "batch_size": 4}
    with pytest.raises(UserError, match=rf"calibration.samples: 4 in batches of 4 .*steps.{step}.* use 8"):
        figures(tmp_path, tiny_llama, SCHEME, {step: FEW}, calibration=few)


def test_weights_on_the_meta_device_are_refused_by_name():
    prepared = Prepared("llama", SchemeConfig(weight=QuantSpec(bits=4)))
    block, name = prepared.network.blocks[0], "model.layers.0.self_attn.q_proj"
    linear = prepared.context.module(name)
    linear.weight = torch.nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    with pytest.raises(UserError, match=f"{name}: the weight is on the meta device"):
        trainable(prepared.context, block, lambda n, w: w, BlockInputs(prepared.context, block), {})
