"""Runs that evaluate by integer kernels: the simulation's figures to rounding, taken up with the same bits, refused by name before the work."""

import pytest
import yaml

from ptq.errors import UserError
from ptq.run.experiment import dry_run, run
from tests.tools.tiny_runs import metrics_of, tiny_recipe

TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}
SCHEMES = {
    "W8A8 per token": {"weight": {"bits": 8}, "input": TOKEN},
    "W8A8 static": {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}},
    # Codes with which no processor's sums of 16 bits overflow: every kernel of integers can multiply by them.
    "W7A8 per token": {"weight": {"bits": 7}, "input": TOKEN},
    "W4A4 in groups": {"weight": {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}, "input": {**TOKEN, "bits": 4}},
}  # fmt: skip


@pytest.fixture
def made(tmp_path, tiny_llama):
    def recipe(scheme, kernels="auto", steps=None, **execution):
        evaluation = {"windows": 4, "length": 64, "resamples": 100}
        execution = {"kernels": kernels, "device": "cpu", **execution}
        return tiny_recipe(
            tmp_path, tiny_llama, scheme, steps or {"rtn": {}}, evaluation=evaluation, execution=execution
        )

    return recipe


def metrics(recipe):
    return metrics_of(run(recipe))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_perplexity_by_integers_is_the_simulated_one_to_rounding(made, scheme):
    simulated, integer = metrics(made(scheme, "simulated")), metrics(made(scheme))
    # One rounding of a sum otherwise turns few codes of later inputs.
    assert integer["quantized_perplexity"] == pytest.approx(simulated["quantized_perplexity"], rel=2e-3)
    assert integer["window_losses"]["baseline"] == simulated["window_losses"]["baseline"]


def test_kernels_give_one_another_the_same_bits_resident_and_offloaded(made):
    losses = [
        metrics(made(SCHEMES["W7A8 per token"], kernels, **more))["window_losses"]["quantized"]
        for kernels in ("int_mm", "onednn_int8", "auto")
        for more in ({}, {"weights": "offloaded"})
    ]
    assert all(other == losses[0] for other in losses)


def test_which_kernels_ran_and_why_some_linears_are_simulated_is_in_the_log(made):
    scheme = {
        **SCHEMES["W7A8 per token"],
        "overrides": [{"modules": "*.down_proj", "tensors": {"input": None}}],
    }
    log = (run(made(scheme)) / "run.log").read_text()
    m = metrics(made(scheme))
    assert m["kernels"]["quantized"] == {"integer": 24, "simulated": 4} and not m["simulated"]
    assert m["kernels"]["refused"] == {"the input is in floating point": 4}
    assert "kernels: 24 Linears by integer, 4 Linears by simulated (4 simulated: the input is in floating point)" in log


def test_a_kernel_that_a_linear_cannot_have_is_refused_with_those_that_it_can_have(made, capsys):
    recipe = made(SCHEMES["W4A4 in groups"], "onednn_int8")
    with pytest.raises(UserError) as refused:
        dry_run(recipe)
    assert str(refused.value) == (
        "execution.kernels: 'onednn_int8' cannot multiply model.layers.0.self_attn.q_proj: "
        "onednn_int8: it takes one scale a row of the weight, not groups: use int_mm, auto, simulated"
    )
    dry_run(made(SCHEMES["W4A4 in groups"], "int_mm"))
    assert "kernels: 28 Linears by int_mm" in capsys.readouterr().out


def test_a_kernel_that_is_not_there_is_refused_with_the_nearest(made):
    with pytest.raises(
        UserError, match=r"execution.kernels: 'int_mn' is not valid: expected one of .*did you mean 'int_mm'"
    ):
        dry_run(made(SCHEMES["W8A8 per token"], "int_mn"))


def test_what_was_timed_is_kept_for_the_next_run(made, tmp_path):
    run(made(SCHEMES["W7A8 per token"]))
    [entry] = (tmp_path / "store" / "kernel-timings").iterdir()
    before = yaml.safe_load((entry / "entry.safetensors").read_text())
    assert all(set(t) == {"int_mm", "fbgemm", "onednn_int8"} for t in before.values())
    run(made(SCHEMES["W7A8 per token"], steps={"smooth": {"alpha": 0.5}, "rtn": {}}))
    assert before.items() <= yaml.safe_load((entry / "entry.safetensors").read_text()).items()
