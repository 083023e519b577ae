"""The Python doors: a recipe by its name, a model in memory."""

import pytest
import torch
import transformers

import ptq
from ptq.errors import UserError
from ptq.network.block_stream import BlockStream
from quantize.modules.simulated import QuantLinear

SMALL = ["data=docs", "calibration.samples=4", "calibration.length=64", "evaluation.windows=4", "evaluation.length=64"]


@pytest.fixture
def places(tmp_path, tiny_llama):
    return [*SMALL, f"model.path={tiny_llama}", f"outputs={tmp_path / 'outputs'}", f"store={tmp_path / 'store'}"]


@pytest.fixture
def ids():
    return torch.randint(32, 120, (4, 48), generator=torch.Generator().manual_seed(1))


def test_a_recipe_run_by_its_name_gives_metrics_frames_pictures_and_a_model_that_generates(places):
    result = ptq.run("smollm2-135m_w8a8", places)
    assert result.metrics["windows"] == 4 and 0.9 < result.metrics["ratio"] < 1.1
    assert len(result.layers) == 4 * 7 and result.layers["output_error"].between(0, 0.2).all()
    assert list(result.windows.columns) == ["baseline", "quantized"] and len(result.windows) == 4
    assert {"tensor", "format"} <= set(result.tensors.columns)
    assert "errors" in result.figures
    assert all(picture._repr_png_()[:4] == b"\x89PNG" for picture in result.figures.values())
    assert "quantized_perplexity" in result._repr_html_()
    inputs = result.tokenizer("The module ", return_tensors="pt", add_special_tokens=False)
    made = result.model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 5
    assert sum(isinstance(m, QuantLinear) for m in result.model.modules()) == 4 * 7


def test_a_finished_run_gives_its_figures_and_says_why_it_has_no_model(places, monkeypatch):
    first = ptq.run("smollm2-135m_w8a8", places)
    monkeypatch.setattr(BlockStream, "run", lambda *a, **k: pytest.fail("a pass ran"))
    again = ptq.run("smollm2-135m_w8a8", " ".join(places))
    assert again.metrics == first.metrics
    with pytest.raises(UserError, match="finished before: run again with force=True"):
        again.model  # noqa: B018


def test_a_model_in_memory_is_quantized_in_place_with_its_steps_proved(tiny_llama, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = model(input_ids=ids).logits
    done = ptq.quantize(model, "w4a16_g64", {"smooth": {}, "gptq": {}}, ids=ids)
    after = done.model(input_ids=ids).logits
    assert done.model is model and len(done.layers) == 4 * 7
    assert done.proofs["smooth"].error <= done.proofs["smooth"].tolerance
    assert 0 < float((after - before).norm() / before.norm()) < 0.3
    nearest = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ptq.quantize(nearest, "w4a16_g64")
    rtn = nearest(input_ids=ids).logits
    assert float((after - before).norm()) < float((rtn - before).norm())


def test_static_ranges_are_taken_from_the_ids_that_are_given(tiny_llama, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = model(input_ids=ids).logits
    ptq.quantize(model, "w8a8_static", ids=ids)
    assert 0 < float((model(input_ids=ids).logits - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheme": "w9a9"}, "w9a9"),
        ({"scheme": "w8a8_static"}, "ids: null, but the steps look at activations"),
        ({"scheme": "w8a8", "steps": {"gtpq": {}}}, "did you mean 'gptq'"),
        ({"scheme": "w8a8", "steps": {"gptq": {}}, "ids": torch.zeros(3)}, "expected int64"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tiny_llama, arguments, words):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with pytest.raises(UserError, match=words) as error:
        ptq.quantize(model, **arguments)
    assert "\n" not in str(error.value)
