"""HQQ on tiny trained models."""

import pytest

from ptq.errors import UserError
from tests.ptq.steps.test_solvers import figures

GROUPS = {"bits": 2, "granularity": "group", "group_size": 32, "symmetric": False}


def test_hqq_loses_less_than_minimum_to_maximum_and_needs_no_data(tmp_path, tiny_llama):
    plain, _ = figures(tmp_path, tiny_llama, {"weight": {"bits": 3}}, {"rtn": {}})
    hqq, _ = figures(tmp_path, tiny_llama, {"weight": {"bits": 3}}, {"hqq": {}})
    assert hqq["kl_mean"] < 0.8 * plain["kl_mean"]
    assert "calibration" not in hqq["seconds"]


def test_hqq_without_iterations_is_rounding_to_nearest(tmp_path, tiny_llama):
    plain, _ = figures(tmp_path, tiny_llama, {"weight": GROUPS}, {"rtn": {}})
    none, _ = figures(tmp_path, tiny_llama, {"weight": GROUPS}, {"hqq": {"iterations": 0}})
    assert none["quantized_perplexity"] == plain["quantized_perplexity"]


@pytest.mark.parametrize(
    ("weight", "options", "words"),
    [
        (
            {"format": "nf4", "bits": 4, "granularity": "group", "group_size": 64},
            {},
            "'nf4' has no ranges for steps.hqq",
        ),
        (GROUPS, {"norm": 0.0}, "steps.hqq.norm: 0.0"),
        (GROUPS, {"iterations": -1}, "steps.hqq.iterations: -1"),
    ],
)
def test_what_hqq_cannot_do_is_refused(tmp_path, tiny_llama, weight, options, words):
    with pytest.raises(UserError, match=words):
        figures(tmp_path, tiny_llama, {"weight": weight}, {"hqq": options})
