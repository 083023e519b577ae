"""Trellis codes end to end: a tiny trained LLaMA comes nearer to itself than with integers of more bits; one block of it is quantized."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import check_scheme
from ptq.errors import UserError
from ptq.run.experiment import dry_run, run
from quantize.codecs.registry import codec_of
from quantize.modules.simulated import QuantLinear
from quantize.spec.quant_spec import spec_of

TRELLIS = {"format": "trellis", "bits": 2, "granularity": "channel"}
INTEGERS = {"bits": 2, "granularity": "group", "group_size": 64, "symmetric": False, "range": "mse"}
ROTATED = {"rotate": {"online": []}, "gptq": {"target": "residual", "held_out": 4, "relative": True}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_llama):
    """The function from a weight's format and steps to a recipe of the tiny model; all share a store."""
    folder = tmp_path_factory.mktemp("trellis")

    def make(weight, steps, **changes):
        base = {
            "name": "trellis", "model": {"path": str(tiny_llama)}, "scheme": {"weight": weight, "exclude": ["*.layers.[!0].*"]}, "steps": steps,
            "calibration": {"samples": 8, "length": 64}, "evaluation": {"windows": 4, "length": 64},
            "outputs": str(folder / "outputs"), "store": str(folder / "store"),
        }  # fmt: skip
        return recipe_from({**base, **changes})

    return make


def metrics_of(recipe):
    return json.loads((run(recipe) / "metrics.json").read_text())


def test_it_comes_nearer_than_integers_in_groups_and_gptq_nearer_than_rounding(recipe):
    found = {
        (name, step): metrics_of(recipe(weight, steps))
        for name, weight in (("trellis", TRELLIS), ("int", INTEGERS))
        for step, steps in (("rtn", {"rtn": {}}), ("gptq", ROTATED))
    }
    assert all(
        found["trellis", step]["size"]["bits_per_weight"] < found["int", step]["size"]["bits_per_weight"]
        for step in ("rtn", "gptq")
    )
    for step in ("rtn", "gptq"):
        assert found["trellis", step]["kl_mean"] < 0.8 * found["int", step]["kl_mean"]
    assert found["trellis", "gptq"]["kl_mean"] < 0.8 * found["trellis", "rtn"]["kl_mean"]


def test_saved_blocks_hold_the_codes_and_give_the_weight_back(recipe):
    folder = run(recipe(TRELLIS, {"gptq": {}}, execution={"save": True}))
    saved = load_file(folder / "quantized" / "block-00000.safetensors")
    prefix, shape, spec = "model.layers.0.mlp.down_proj.", (128, 320), spec_of("trellis")
    stored = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == codec_of(spec).layout(shape, spec)
    linear = QuantLinear.from_stored(stored, shape, None, spec)
    assert torch.equal(linear.weight, codec_of(spec).decode(stored, spec, shape))
    assert torch.isfinite(linear.weight).all() and linear.weight.abs().max() > 0


def test_tuning_learns_the_rows_scales_and_leaves_the_codes(recipe):
    tensors, kl = [], []
    for steps in ({"gptq": {}}, {"gptq": {}, "tune": {"steps": 16, "rate": 1e-2, "norm_rate": 1e-2, "held_out": 4}}):
        folder = run(recipe(TRELLIS, steps, execution={"save": True}))
        kl.append(json.loads((folder / "metrics.json").read_text())["kl_mean"])
        tensors.append(load_file(folder / "quantized" / "block-00000.safetensors"))
    assert kl[1] < 0.97 * kl[0]
    before, after = tensors
    assert all(torch.equal(t, after[name]) for name, t in before.items() if name.endswith(".codes"))
    ratios = torch.cat([(after[name] / t).flatten() for name, t in before.items() if name.endswith(".scale")])
    assert 0.7 < ratios.min() < 0.999 and 1.001 < ratios.max() < 1.4


def test_options_of_gptq_that_need_levels_are_refused_before_the_work(recipe):
    for options, message in (
        ({"scales": "pivots"}, "steps.gptq.scales: 'pivots' needs levels, and format 'trellis' has none: use range"),
        ({"descent": 2}, "steps.gptq.descent: 2 needs levels, and format 'trellis' has none: use 0"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            dry_run(recipe(TRELLIS, {"gptq": options}))
    with pytest.raises(UserError, match=r"^scheme.weight.format: 'trellis' has no levels .* steps.rtn.scales"):
        dry_run(recipe(TRELLIS, {"rtn": {"scales": "diagonal"}}))


def test_columns_that_are_no_whole_tiles_are_refused_before_the_work():
    scheme = SchemeConfig(weight=spec_of("trellis"))
    check_scheme(scheme, {"a": (24, 32)}, 8)
    with pytest.raises(UserError, match=r"'trellis' takes columns in multiples of 16, and a has 40: use int there"):
        check_scheme(scheme, {"a": (32, 40)}, 8)
