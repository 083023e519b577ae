"""Clipped ranges: inputs' by the step clip, weights' by the option of rtn, on tiny trained models."""

import pytest

from ptq.errors import UserError
from tests.ptq.steps.test_solvers import figures

TOKEN = {"bits": 3, "granularity": "token", "dynamic": True}
STATIC = {"bits": 5, "granularity": "tensor", "symmetric": False}


@pytest.mark.parametrize("inputs", [TOKEN, STATIC])
def test_clipped_inputs_lose_less_and_the_result_says_how_far_they_are_clipped(tmp_path, tiny_llama, inputs):
    plain, _ = figures(tmp_path, tiny_llama, {"input": inputs}, {"rtn": {}})
    clipped, _ = figures(tmp_path, tiny_llama, {"input": inputs}, {"clip": {}, "rtn": {}})
    assert clipped["kl_mean"] < 0.97 * plain["kl_mean"]
    tables = [path.read_text() for path in (tmp_path / "outputs").rglob("layers.csv")]
    assert sorted(" clip 0." in table for table in tables) == [False, True]


def test_a_scheme_with_nothing_to_clip_is_refused(tmp_path, tiny_opt):
    for scheme in ({"weight": {"bits": 4}}, {"input": {**STATIC, "range": "mse"}}):
        with pytest.raises(UserError, match="steps.clip: no input of the scheme .* ~steps.clip"):
            figures(tmp_path, tiny_opt, scheme, {"clip": {}, "rtn": {}})
    with pytest.raises(UserError, match=r"steps.clip.ratios: 1.5 is too great: use 1"):
        figures(tmp_path, tiny_opt, {"input": TOKEN}, {"clip": {"ratios": [1.5]}, "rtn": {}})


@pytest.mark.parametrize("form", ["int", "mxfp4"])
def test_searched_ranges_of_weights_lose_less_than_the_formats_own(tmp_path, tiny_llama, form):
    spec = {"bits": 2, "granularity": "group", "group_size": 32} if form == "int" else {"format": form, "bits": 4}
    weight = spec if form == "int" else {**spec, "granularity": "group", "group_size": 32}
    plain, diagonal, block = (
        figures(tmp_path, tiny_llama, {"weight": weight}, {"rtn": {"scales": scales}})[0]["kl_mean"]
        for scales in ("range", "diagonal", "block")
    )
    assert diagonal < plain and block < plain


def test_a_search_of_scales_needs_a_format_that_has_them(tmp_path, tiny_llama):
    with pytest.raises(UserError, match=r"scheme.weight.format: 'q8_0' has no levels .* steps.rtn.scales"):
        figures(tmp_path, tiny_llama, {"weight": {"format": "q8_0", "granularity": "group", "group_size": 32}}, {"rtn": {"scales": "block"}})  # fmt: skip
    with pytest.raises(UserError, match=r"steps.rtn.scales: 'blok' is not valid.*block"):
        figures(tmp_path, tiny_llama, {"weight": {"bits": 4}}, {"rtn": {"scales": "blok"}})


def test_a_transform_after_the_clips_would_undo_what_they_measured_and_is_refused(tmp_path, tiny_llama):
    with pytest.raises(UserError, match="steps.smooth: changes what steps.clip has measured: put steps.smooth before"):
        figures(tmp_path, tiny_llama, {"input": TOKEN}, {"clip": {}, "smooth": {}, "rtn": {}})


def test_smoothing_by_a_formula_after_a_rotation_is_warned_of(tmp_path, tiny_llama):
    scheme = {"weight": {"bits": 8}, "input": {**TOKEN, "bits": 8}}
    for search in (False, True):
        steps = {"rotate": {}, "smooth": {"search": search}, "rtn": {}}
        _, log = figures(tmp_path, tiny_llama, scheme, steps)
        assert ("smooth: its formula goes by" in log) == (not search)
