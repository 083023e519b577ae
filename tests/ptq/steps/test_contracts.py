"""The contracts, proved by three methods written as somebody outside would: on the residual stream, online, and learned."""

import functools
import pathlib

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptq.errors import UserError
from ptq.run.experiment import run
from tests.tools.tiny_runs import metrics_of, saved, tiny_recipe

METHODS = pathlib.Path(__file__).parents[2] / "methods"
TOKEN4 = {"bits": 4, "granularity": "token", "dynamic": True}
W4A4 = {"weight": {"bits": 4}, "input": TOKEN4}
ROTATE = {"_target_": "rotated_stream.Step"}


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """Methods are found as somebody's own modules are."""
    monkeypatch.syspath_prepend(str(METHODS))


make = functools.partial(tiny_recipe, samples=8, windows=8)


def shaken(config, folder):
    """A random model of that config, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return saved(model, folder)


UNTIED = {
    "RMS norm": transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "layer norm, side by side": transformers.GPTNeoXConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture(params=["RMS norm, tied", "layer norm, tied", *UNTIED])
def model(request, tmp_path):
    """Norms of both kinds, heads that are tied and not, attention and MLP one after the other and side by side."""
    if request.param in UNTIED:
        return shaken(UNTIED[request.param], tmp_path / "model")
    return request.getfixturevalue("tiny_llama" if request.param.startswith("RMS") else "tiny_opt")


def test_a_rotation_of_the_whole_residual_stream_changes_nothing_but_rounding(tmp_path, model):
    m = metrics_of(run(make(tmp_path, model, {}, {"rotate": ROTATE})))
    assert m["kl_mean"] < 1e-6 and m["top1_agreement"] == 1
    assert m["quantized_perplexity"] == pytest.approx(m["baseline_perplexity"], rel=1e-4)
    assert m["quantized_perplexity"] != m["baseline_perplexity"]


def test_a_rotation_is_solved_on_with_the_reference_in_the_same_basis(tmp_path, tiny_llama_outliers):
    plain = metrics_of(run(make(tmp_path, tiny_llama_outliers, W4A4, {"gptq": {"target": "residual"}})))
    turned = metrics_of(
        run(make(tmp_path, tiny_llama_outliers, W4A4, {"rotate": ROTATE, "gptq": {"target": "residual"}}))
    )
    assert turned["difference"] < 0.5 * plain["difference"]


def test_static_ranges_after_a_rotation_are_those_of_the_rotated_stream(tmp_path, tiny_llama_outliers):
    static = {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}}
    # What o and down read is not of the residual stream, and as outlying as before.
    static["exclude"] = ["*.o_proj", "*.down_proj"]
    plain = metrics_of(run(make(tmp_path, tiny_llama_outliers, static, {"rtn": {}})))
    turned = metrics_of(run(make(tmp_path, tiny_llama_outliers, static, {"rotate": ROTATE, "rtn": {}})))
    assert turned["difference"] < 0.5 * plain["difference"]


def test_a_rotation_that_forgets_the_writers_is_stopped_at_the_first_block(tmp_path, tiny_llama):
    with pytest.raises(UserError, match=r"steps.rotate: changes the output of model.layers.0 by .*~steps.rotate"):
        run(make(tmp_path, tiny_llama, W4A4, {"rotate": {**ROTATE, "forget": True}, "rtn": {}}))


@pytest.mark.parametrize("target", ["present", "original"])
def test_an_online_transform_is_seen_by_the_solver_the_simulation_and_the_saved_blocks(
    tmp_path, tiny_llama_outliers, target
):
    down = {"overrides": [{"modules": "*.down_proj", "tensors": W4A4}]}
    online = {"online": {"_target_": "hadamard_before_down.Step"}}
    unquantized = metrics_of(run(make(tmp_path, tiny_llama_outliers, {}, online)))
    assert unquantized["kl_mean"] < 1e-6
    solver = {"gptq": {"target": target}}
    plain = metrics_of(run(make(tmp_path, tiny_llama_outliers, down, solver)))
    folder = run(make(tmp_path, tiny_llama_outliers, down, {**online, **solver}, execution={"save": True}))
    assert metrics_of(folder)["difference"] < 0.7 * plain["difference"]
    saved = load_file(folder / "quantized" / "block-00000.safetensors")
    assert "model.layers.0.mlp.down_proj.online_input.inner.matrix" in saved


def test_an_online_transform_is_refused_by_an_export_before_the_work(tmp_path, tiny_llama):
    steps = {"online": {"_target_": "hadamard_before_down.Step"}, "rtn": {}}
    recipe = make(tmp_path, tiny_llama, {"weight": {"bits": 8}}, steps, export={"format": "compressed-tensors"})
    with pytest.raises(UserError, match=r"export.format: compressed-tensors .*steps.online.*input.*~steps.online"):
        run(recipe)


def test_a_scale_learned_by_ten_gradient_steps_beats_the_one_not_learned(tmp_path, tiny_llama):
    scheme = {"weight": {"bits": 2}}
    mine = {"_target_": "learned_scale.Step"}
    plain = metrics_of(run(make(tmp_path, tiny_llama, scheme, {"mine": {**mine, "steps": 0}})))
    nearest = metrics_of(run(make(tmp_path, tiny_llama, scheme, {"rtn": {}})))
    learned = metrics_of(run(make(tmp_path, tiny_llama, scheme, {"mine": mine})))
    assert plain["quantized_perplexity"] == nearest["quantized_perplexity"]
    assert learned["difference"] < 0.8 * plain["difference"]
