"""The estimate of a run's memory: near what is held, and a run that cannot fit is refused with what would make it fit."""

import pytest
import transformers

from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.network.network import build_network
from ptq.network.skeleton import skeleton
from ptq.run.forecast.memory_estimate import (
    PROCESS,
    check_memory,
    check_sensitivity_memory,
    estimate,
    estimate_sensitivity,
    memory_of,
)
from ptq.steps._registry import build_steps


def prepared(tmp_path, steps, **changes):
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    config.save_pretrained(folder)
    recipe = recipe_from(
        {
            "name": "memory",
            "model": {"path": str(folder)},
            "execution": {"device": "cpu"},
            "scheme": {"weight": {"bits": 4}},
            "steps": steps,
            **changes,
        }
    )
    return recipe, skeleton(recipe.model, weights=False), build_steps(recipe.steps)


def test_the_greatest_phase_holds_weights_hidden_states_and_moments(tmp_path):
    recipe, network, steps = prepared(tmp_path, {"gptq": {"target": "residual"}})
    found = estimate(recipe, network, steps)
    weights = 4 * network.parameters
    tokens = recipe.calibration.samples * recipe.calibration.length
    flows = 4 * 1024 * (2 * tokens + 2 * recipe.evaluation.windows * recipe.evaluation.length)
    assert found.worst[0] == "quantize"
    assert weights + flows < found.worst[1] < 3 * (weights + flows)
    assert set(found.phases) == {"load", "calibration", "baseline", "quantize", "evaluate"}


def test_tuning_holds_the_graph_of_a_sample_and_cannot_be_mended_by_offloaded_weights(tmp_path):
    steps = {"gptq": {}, "tune": {"batch": 4}}
    recipe, network, built = prepared(tmp_path, steps)
    found = estimate(recipe, network, built)
    for changed in ({"batch": 1}, {"batch": 16}):
        assert estimate(*prepared(tmp_path, {"gptq": {}, "tune": changed})).phases == found.phases
    double = {"samples": recipe.calibration.samples // 2, "length": 2 * recipe.calibration.length}
    longer = estimate(*prepared(tmp_path, steps, calibration=double)).phases["tune"]
    channels = 8 * (4 * 2 * 1024 + 3 * (1024 + 2816))
    assert longer - found.phases["tune"] == 2 * 4 * recipe.calibration.length * channels
    assert found.worst[0] == "tune" and found.worst[1] > 2 * 4 * network.parameters
    with pytest.raises(UserError, match=r"\(tune\)") as error:
        check_memory(recipe, network, built, PROCESS + found.worst[1] // 2)
    assert "offloaded" not in str(error.value)


def test_a_solver_that_learns_holds_a_blocks_weights_several_times(tmp_path):
    rounded, learned = (estimate(*prepared(tmp_path, {name: {}})).phases["quantize"] for name in ("gptq", "autoround"))
    _, network, _ = prepared(tmp_path, {"gptq": {}})
    block = sum(p.numel() for p in network.blocks[0].module.parameters())
    assert learned - rounded == 4 * 7 * block, (
        "batches of four samples have four parts: three sums of gradients at once"
    )


def test_a_sensitivity_holds_what_reaches_every_block_and_is_refused_with_what_would_make_it_fit(tmp_path):
    recipe, network, _ = prepared(tmp_path, {"rtn": {}}, calibration={"batch_size": 1})
    few, many = (estimate_sensitivity(recipe, network, formats) for formats in (2, 5))
    tokens = recipe.calibration.samples * recipe.calibration.length
    states = 4 * 1024 * (8 + 2) * tokens
    assert 4 * network.parameters + states < many.worst[1] < 2 * (4 * network.parameters + states)
    block = sum(p.numel() for p in network.blocks[0].module.parameters())
    assert many.phases["backward"] - few.phases["backward"] == 4 * 3 * block
    assert check_sensitivity_memory(recipe, network, 5, 64 << 30).startswith("memory: some")
    with pytest.raises(UserError, match=r"\(backward\).*: use execution.hidden_states=disk"):
        check_sensitivity_memory(recipe, network, 5, PROCESS + many.worst[1] - states // 2)
    with pytest.raises(UserError, match="no setting makes it fit"):
        check_sensitivity_memory(recipe, network, 5, PROCESS)


def test_rounding_to_nearest_takes_less_than_solving_and_offloaded_less_than_resident(tmp_path):
    (recipe, network, rtn), (_, _, gptq) = prepared(tmp_path, {"rtn": {}}), prepared(tmp_path, {"gptq": {}})
    assert estimate(recipe, network, rtn).worst[1] < estimate(recipe, network, gptq).worst[1]
    offloaded, *_ = prepared(tmp_path, {"rtn": {}}, execution={"device": "cpu", "weights": "offloaded"})
    assert estimate(offloaded, network, rtn).worst[1] < 0.7 * estimate(recipe, network, rtn).worst[1]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_a_run_that_cannot_fit_is_refused_with_settings_that_make_it_fit(tmp_path, share):
    recipe, network, steps = prepared(tmp_path, {"gptq": {"target": "original"}})
    need = estimate(recipe, network, steps).worst[1]
    there = PROCESS + int(share * need)
    with pytest.raises(UserError, match=r"GiB at its peak \(quantize\), .* GiB there: use (\S.*)") as error:
        check_memory(recipe, network, steps, there)
    advice = str(error.value).rpartition(": use ")[2]
    fields = {}
    for word in advice.split():
        key, value = word.split("=")
        section, name = key.split(".")
        fields.setdefault(section, {})[name] = int(value) if value.isdigit() else value
    fields.setdefault("execution", {})["device"] = "cpu"
    mended, network, steps = prepared(tmp_path, {"gptq": {"target": "original"}}, **fields)
    assert check_memory(mended, network, steps, there).startswith("memory: some")


def test_where_nothing_helps_the_line_says_so(tmp_path):
    recipe, network, steps = prepared(tmp_path, {"gptq": {}})
    with pytest.raises(UserError, match="no setting makes it fit"):
        check_memory(recipe, network, steps, PROCESS)


def test_a_run_that_fits_is_told_what_it_takes_and_what_is_there(tmp_path):
    recipe, network, steps = prepared(tmp_path, {"rtn": {}})
    assert check_memory(recipe, network, steps, 64 << 30).endswith("64.0 GiB there")
    assert memory_of(recipe) > 1 << 28
    assert build_network(network.model).parameters == network.parameters
