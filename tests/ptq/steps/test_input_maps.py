"""wush and affine: nothing but rounding changes on every architecture, four bits lose less, and the maps are counted and kept."""

import re

import pytest
from safetensors.torch import load_file

from ptq.errors import UserError
from ptq.testing import ARCHITECTURES, random_tiny
from tests.tools.tiny_runs import saved, tiny_run

TOKEN4 = {"bits": 4, "granularity": "token", "dynamic": True}
W4A4 = {"weight": {"bits": 4}, "input": TOKEN4}
STEPS = {"wush": {}, "affine": {"steps": 8}}


def figures(*args, **changes):
    """The metrics of a run, its folder and its log."""
    ran = tiny_run(*args, **{"windows": 8, "length": 32, **changes})
    return ran.metrics, ran.folder, ran.log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", STEPS)
def test_a_mapped_network_computes_what_it_did_on_every_architecture(tmp_path, architecture, name):
    model = random_tiny(architecture)
    model.resize_token_embeddings(258)
    folder = saved(model, tmp_path / architecture)
    # With no solver nothing is rounded: what is compared is the map and its inverse.
    metrics, _, log = figures(tmp_path, folder, {"input": TOKEN4}, {name: STEPS[name]})
    assert metrics["kl_mean"] < 1e-6
    assert f"{name}: " in log and "expected error" in log


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [
        (W4A4, {"wush": {}}),
        (W4A4, {"affine": {"steps": 0}}),
        (
            {
                "weight": {"bits": 4, "granularity": "group", "group_size": 32},
                "input": {**TOKEN4, "granularity": "group", "group_size": 32},
            },
            {"wush": {}},
        ),
    ],
)
def test_a_map_takes_most_of_what_four_bits_lose_counts_in_the_bits_and_is_saved(
    tmp_path, tiny_llama_outliers, scheme, steps
):
    shape = {"calibration": {"samples": 8, "length": 128}, "evaluation": {"windows": 8, "length": 128}}
    plain, *_ = figures(tmp_path, tiny_llama_outliers, scheme, {"rtn": {}}, **shape)
    mapped, folder, log = figures(
        tmp_path, tiny_llama_outliers, scheme, {**steps, "rtn": {}}, execution={"save": True}, **shape
    )
    assert mapped["difference"] < 0.2 * plain["difference"]
    assert f"{next(iter(steps))}: proved on every block" in log
    block = load_file(folder / "quantized" / "block-00000.safetensors")
    maps = {t.numel() for name, t in block.items() if "down_proj.online_input" in name}
    assert maps
    # Four inputs a block, 16 bits a number, over all of the block's weights: as the maps of this width have them.
    extra = mapped["size"]["bits_per_weight"] - plain["size"]["bits_per_weight"]
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    numbers = sum(t.numel() for name, t in block.items() if any(f"{n}.online_input" in name for n in names))
    weights = sum(t.numel() for name, t in block.items() if name.endswith("_proj.codes"))
    assert extra == pytest.approx(16 * numbers / weights, rel=1e-3)


def test_steps_of_learning_lower_the_estimate_and_a_killed_run_has_the_same_maps(tmp_path, tiny_llama_outliers):
    _, _, log = figures(tmp_path, tiny_llama_outliers, W4A4, {"affine": {"steps": 30}, "rtn": {}})
    found = [tuple(map(float, pair)) for pair in re.findall(r"expected error ([\d.]+)% -> ([\d.]+)%", log)]
    assert len(found) == 16
    assert all(after <= before for before, after in found)
    assert sum(after for _, after in found) < 0.9 * sum(before for before, _ in found)


def test_a_map_after_an_online_rotation_leaves_that_input_alone_and_says_so(tmp_path, tiny_llama):
    steps = {"rotate": {"residual": False, "values": False, "online": ["down"]}, "wush": {}, "rtn": {}}
    _, _, log = figures(tmp_path, tiny_llama, W4A4, steps)
    assert "wush: model.layers.0.mlp.down_proj left alone: another step acts on its input online" in log


@pytest.mark.parametrize(
    ("scheme", "steps", "words"),
    [
        ({"weight": {"bits": 4}}, {"wush": {}, "rtn": {}}, "steps.wush: scheme.input is null.*~steps.wush"),
        (W4A4, {"wush": {"block": 48}, "rtn": {}}, "steps.wush.block: 48 does not divide the 128 channels"),
        (W4A4, {"wush": {"dampings": []}, "rtn": {}}, "steps.wush.dampings: .*list numbers above 0"),
        (W4A4, {"affine": {"starts": ["wash"]}, "rtn": {}}, "did you mean 'wush'"),
        (W4A4, {"affine": {"rate": 0.0}, "rtn": {}}, "steps.affine.rate: 0.0 is too small"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, tiny_llama, scheme, steps, words):
    with pytest.raises(UserError, match=words):
        figures(tmp_path, tiny_llama, scheme, steps)


@pytest.mark.parametrize("name", STEPS)
def test_an_export_refuses_a_map_before_the_work(tmp_path, tiny_llama, name):
    scheme = {"weight": {"bits": 8}, "input": {**TOKEN4, "bits": 8}}
    with pytest.raises(UserError, match=rf"compressed-tensors has no place for what steps.{name} does at the input"):
        figures(tmp_path, tiny_llama, scheme, {name: {}, "rtn": {}}, export={"format": "compressed-tensors"})
