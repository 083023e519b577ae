"""llama.cpp's importance matrix: sums of squares of each Linear's input, under llama.cpp's names."""

import gguf
import numpy as np
import pytest
import torch

from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.export.packing.imatrix import _squares
from ptq.run.experiment import collect_statistics
from ptq.run.exports import check_imatrix, export_imatrix


def test_a_file_holds_the_sums_of_squares_of_every_linears_input(tiny_llama, tmp_path, capsys):
    recipe = recipe_from(
        {
            "name": "imatrix",
            "model": {"path": str(tiny_llama)},
            "calibration": {"samples": 4, "length": 32},
            "evaluation": {"length": 32},
            "scheme": {"weight": {"bits": 4}},
            "steps": {"rtn": {}},
            "outputs": str(tmp_path / "outputs"),
            "store": str(tmp_path / "store"),
        }
    )
    path = export_imatrix(recipe, check_imatrix(recipe), collect_statistics(recipe), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(tensors) == 2 * 28 and "28 Linears" in capsys.readouterr().out
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (
        fields["general.type"] == "imatrix"
        and fields["imatrix.chunk_count"] == 4
        and fields["imatrix.chunk_size"] == 32
    )
    assert tensors["blk.0.attn_q.weight.counts"].ravel().tolist() == [128]
    q, k = (tensors[f"blk.0.attn_{x}.weight.in_sum2"] for x in "qk")
    assert np.array_equal(q, k) and (q > 0).all()
    assert tensors["blk.3.ffn_down.weight.in_sum2"].shape[-1] > q.shape[-1]


def test_sums_of_squares_are_those_of_the_values():
    x = torch.randn(50, 8, dtype=torch.float64) + 3
    found = _squares(x.mean(0), (x - x.mean(0)).square().sum(0), 50)
    np.testing.assert_allclose(found[0], x.square().sum(0).numpy(), rtol=1e-6)


def test_other_architectures_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("ptq.run.exports.check_model", lambda config: type("Config", (), {"model_type": "opt"}))
    recipe = recipe_from({"name": "x", "model": {"path": "nowhere"}})
    with pytest.raises(UserError, match="--imatrix: written for llama.*'opt': leave it out"):
        check_imatrix(recipe)
