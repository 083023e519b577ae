"""How many samples pass together changes neither a code nor a figure."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.run.experiment import run

pytestmark = pytest.mark.usefixtures("one_thread")

TENSOR = {"bits": 4, "granularity": "tensor", "dynamic": True}
STATIC = {"bits": 8, "granularity": "tensor", "symmetric": False}


def ran(tmp_path, model, batch, scheme, steps):
    recipe = {
        "name": f"batch-{batch}",
        "model": {"path": str(model)},
        "calibration": {"samples": 4, "length": 64, "batch_size": batch},
        "evaluation": {"windows": 4, "length": 64, "batch_size": batch},
        "scheme": scheme,
        "steps": steps,
        "execution": {"save": True},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / f"store-{batch}"),
    }
    folder = run(recipe_from(recipe))
    blocks = [load_file(path) for path in sorted((folder / "quantized").glob("block-*.safetensors"))]
    return blocks, json.loads((folder / "metrics.json").read_text())["window_losses"]


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [
        ({"weight": {"bits": 8}, "input": TENSOR}, {"rtn": {}}),
        ({"weight": {"bits": 8}, "input": STATIC}, {"smooth": {}, "rtn": {}}),
        ({"weight": {"bits": 4}}, {"gptq": {}}),
        ({"weight": {"bits": 4}, "input": TENSOR}, {"gptq": {"target": "original"}}),
        ({"weight": {"bits": 4}, "input": STATIC}, {"gptq": {"target": "residual"}}),
        ({"weight": {"bits": 8}, "key": STATIC, "attention_probs": STATIC}, {"rtn": {}}),
    ],
)
def test_samples_may_pass_one_by_one_or_all_together(tmp_path, tiny_llama, scheme, steps):
    blocks, losses = ran(tmp_path, tiny_llama, 1, scheme, steps)
    others, other_losses = ran(tmp_path, tiny_llama, 3, scheme, steps)
    assert other_losses == losses
    for block, other in zip(blocks, others, strict=True):
        assert block.keys() == other.keys() and all(torch.equal(block[name], other[name]) for name in block)
