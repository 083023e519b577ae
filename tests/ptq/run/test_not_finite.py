"""NaN and inf: a run that meets them ends with exit status 2 and says where they began; metrics.json is JSON whatever the figures."""

import json

import pytest
import torch
import transformers
import yaml

from ptq.cli.app import main


def recipe(tmp_path, folder, dtype="auto", **changes):
    """The path of a recipe on the model in `folder`."""
    base = {
        "name": "finite",
        "model": {"path": str(folder), "dtype": dtype},
        "calibration": {"samples": 4, "length": 32},
        "evaluation": {"windows": 3, "length": 32},
        "scheme": {"weight": {"bits": 8}},
        "steps": {"rtn": {}},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    path = tmp_path / "finite.yaml"
    path.write_text(yaml.safe_dump({**base, **changes}))
    return path


def changed(tmp_path, model, change):
    """A copy of the model after `change`, in float32."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        change(loaded)
    loaded.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def explode(model):
    model.model.layers[2].mlp.down_proj.weight.mul_(1e4)
    model.model.layers[2].mlp.up_proj.weight.mul_(1e4)
    model.model.layers[2].mlp.gate_proj.weight.mul_(1e4)


def test_a_model_that_overflows_ends_the_run_with_its_block(tmp_path, tiny_llama, capsys):
    path = recipe(tmp_path, changed(tmp_path, tiny_llama, explode), "float16")
    capsys.readouterr()  # transformers' own progress
    assert main(["run", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: NaN or inf in the unquantized model from model.layers.2 on") and error.count("\n") == 1
    )
    assert not list((tmp_path / "outputs").rglob("metrics.json"))


def test_a_quantized_model_that_overflows_ends_the_run_and_leaves_the_last_result(
    tmp_path, tiny_llama, capsys, monkeypatch
):
    path = recipe(tmp_path, tiny_llama)
    assert main(["run", "--config", str(path)]) == 0
    [result] = (tmp_path / "outputs").rglob("metrics.json")
    before = result.read_bytes()
    from quantize.modules.simulated import QuantLinear

    original = QuantLinear.forward

    def broken(self, x):
        out = original(self, x)
        return out * torch.nan if self.in_features > self.out_features else out

    monkeypatch.setattr(QuantLinear, "forward", broken)
    assert main(["run", "--config", str(path), "--force"]) == 2
    assert "NaN or inf in the quantized model from model.layers.0 on" in capsys.readouterr().err
    assert result.read_bytes() == before and json.loads(before)["ratio"] > 0


def sharpen(model):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2e4)


@pytest.mark.parametrize("windows", [1, 3])
def test_a_perplexity_that_overflows_is_null_in_valid_json_and_the_run_can_be_asked_for_again(
    tmp_path, tiny_llama, capsys, windows
):
    path = recipe(
        tmp_path,
        changed(tmp_path, tiny_llama, sharpen),
        evaluation={"windows": windows, "length": 32},
        scheme={},
        steps={},
    )
    assert main(["run", "--config", str(path)]) == 0
    [result] = (tmp_path / "outputs").rglob("metrics.json")

    def refuse(word):
        raise ValueError(word)

    m = json.loads(result.read_text(), parse_constant=refuse)
    assert m["baseline_perplexity"] is None and m["ratio"] is None and m["kl_mean"] == 0
    out = capsys.readouterr().out
    assert ("one window: no interval" in out) == (windows == 1)
    assert main(["run", "--config", str(path)]) == 0
    assert "perplexity not finite -> not finite" in capsys.readouterr().out
