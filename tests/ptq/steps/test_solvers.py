"""Solvers on tiny trained models, as whole runs."""

import pytest

from ptq.errors import UserError
from tests.tools.tiny_runs import tiny_run

MANY = {"samples": 64, "length": 128}
TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}


def figures(*args, **changes):
    """The metrics of a run, and its log."""
    ran = tiny_run(*args, **{"samples": 16, "windows": 8, "length": 128, **changes})
    return ran.metrics, ran.log


def ratio(*args, **changes):
    """Quantized over baseline perplexity of a run, and its log."""
    metrics, log = figures(*args, **changes)
    return metrics["ratio"], log


@pytest.mark.parametrize(
    "weight", [{"bits": 3}, {"bits": 3, "granularity": "group", "group_size": 32, "symmetric": False}]
)
def test_gptq_beats_rounding_to_nearest_and_the_original_and_the_residual_target_beat_both(
    tmp_path, tiny_llama, weight
):
    steps = ({"rtn": {}}, *({"gptq": {"target": t}} for t in ("present", "original", "residual")))
    rtn, gptq, original, residual = (
        figures(tmp_path, tiny_llama, {"weight": weight}, s, calibration=MANY)[0]["kl_mean"] for s in steps
    )
    # Which of the two targets is the better on so small a model depends on the text it was trained on.
    assert 0 < max(original, residual) < 0.8 * gptq
    assert gptq < 0.2 * rtn


def test_the_residual_target_works_on_rounded_inputs_and_refuses_to_solve_all_linears_at_once(tmp_path, tiny_opt):
    scheme = {"weight": {"bits": 3}, "input": TOKEN}
    found = [
        figures(tmp_path, tiny_opt, scheme, {"gptq": {"target": t}})[0]["kl_mean"] for t in ("residual", "present")
    ]
    assert 0 < found[0] < found[1]
    with pytest.raises(UserError, match="steps.gptq.sequential: false"):
        figures(tmp_path, tiny_opt, scheme, {"gptq": {"target": "residual", "sequential": False}})


def test_held_out_samples_keep_the_residual_target_from_doing_harm_where_tokens_are_few(tmp_path, tiny_llama):
    # What 256 tokens make of it goes up and down with the tokens: four draws.
    draws = [{"samples": 8, "length": 32, "sampling": "random", "seed": seed} for seed in range(4)]
    scheme = {"weight": {"bits": 2, "granularity": "group", "group_size": 32, "symmetric": False}}
    found = {}
    for name, options in {
        "present": {},
        "residual": {"target": "residual"},
        "held out": {"target": "residual", "held_out": 4},
        "damped": {"held_out": 4, "search_damping": True},
    }.items():
        ran = [figures(tmp_path, tiny_llama, scheme, {"gptq": options}, calibration=few) for few in draws]
        found[name] = sum(metrics["kl_mean"] for metrics, _ in ran)
        assert name != "damped" or all("by held out samples" in log for _, log in ran)
    assert found["held out"] < min(found["residual"], found["present"]), found
    assert found["damped"] < found["present"], found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": 8}, "steps.gptq.held_out: nothing is chosen"),
        ({"held_out": 1, "target": "residual"}, "steps.gptq.held_out: 1 .*use 8"),
        ({"search_damping": True}, "steps.gptq.search_damping: .*held_out 8"),
        ({"relative": True}, "steps.gptq.relative: true changes nothing beside .*residual"),
    ],
)
def test_options_of_gptq_that_would_change_nothing_are_refused(tmp_path, tiny_llama, options, words):
    with pytest.raises(UserError, match=words):
        figures(tmp_path, tiny_llama, {"weight": {"bits": 4}}, {"gptq": options})


def test_gptq_offloaded_gives_the_same_figures_as_resident(tmp_path, tiny_opt):
    scheme = {"weight": {"bits": 4}, "input": TOKEN}
    steps = {"smooth": {}, "gptq": {"target": "residual"}}
    resident, log = ratio(tmp_path, tiny_opt, scheme, steps)
    offloaded, _ = ratio(tmp_path, tiny_opt, scheme, steps, execution={"weights": "offloaded", "hidden_states": "disk"})
    assert resident == offloaded
    assert "smooth: proved on every block, largest relative error" in log


@pytest.mark.parametrize("estimator", ["minmax", "percentile", "mse", "ema"])
def test_static_input_ranges_of_every_estimator_give_a_working_model(tmp_path, tiny_llama, estimator):
    static = {"bits": 8, "granularity": "tensor", "symmetric": False, "range": estimator}
    found, _ = ratio(tmp_path, tiny_llama, {"weight": {"bits": 8}, "input": static}, {"rtn": {}})
    assert 0.99 < found < 1.1


def test_query_key_value_and_probabilities_are_quantized_each_in_its_own_way(tmp_path, tiny_llama):
    low = {"bits": 2, "granularity": "token", "symmetric": False, "dynamic": True}
    found = {
        t: figures(tmp_path, tiny_llama, {t: low}, {"rtn": {}})[0]["kl_mean"]
        for t in ("query", "key", "value", "attention_probs")
    }
    assert all(value > 0.003 for value in found.values()) and len(set(found.values())) == 4, found
    static = {"bits": 8, "granularity": "cluster", "symmetric": False}
    tensors = {"query": static, "key": static, "value": static}
    probabilities = {"bits": 8, "granularity": "tensor", "symmetric": False}
    near, _ = ratio(tmp_path, tiny_llama, {**tensors, "attention_probs": probabilities}, {"cluster": {}, "rtn": {}})
    assert 0.98 < near < 1.05
