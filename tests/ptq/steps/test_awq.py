"""AWQ on tiny trained models: it helps rounding where some activations are great, and keeps the function."""

import pytest

from ptq.errors import UserError
from tests.ptq.steps.test_solvers import figures

GROUPS = {"bits": 3, "granularity": "group", "group_size": 32, "symmetric": False}


def test_awq_then_clip_loses_less_than_rounding_and_is_proved_on_every_block(tmp_path, tiny_llama_outliers):
    rtn, clipped, awq = (
        figures(tmp_path, tiny_llama_outliers, {"weight": GROUPS}, steps)
        for steps in ({"rtn": {}}, {"rtn": {"scales": "diagonal"}}, {"awq": {}, "rtn": {"scales": "diagonal"}})
    )
    assert awq[0]["kl_mean"] < 0.8 * rtn[0]["kl_mean"] and awq[0]["kl_mean"] < clipped[0]["kl_mean"]
    assert "awq: proved on every block, largest relative error" in awq[1]


def test_awq_goes_before_gptq(tmp_path, tiny_opt):
    found = figures(tmp_path, tiny_opt, {"weight": GROUPS}, {"awq": {}, "gptq": {"scales": "pivots"}})
    plain = figures(tmp_path, tiny_opt, {"weight": GROUPS}, {"awq": {}, "rtn": {}})
    assert found[0]["kl_mean"] < plain[0]["kl_mean"]


@pytest.mark.parametrize(
    ("scheme", "options", "words"),
    [
        ({"input": {"bits": 8, "granularity": "token", "dynamic": True}}, {}, "scheme.weight: null, but steps.awq"),
        ({"weight": GROUPS}, {"ratios": [1.5]}, r"steps.awq.ratios: 1.5 is too great: use 1"),
        ({"weight": GROUPS}, {"links": ["nrom"]}, r"steps.awq.links: 'nrom' .*norm"),
    ],
)
def test_what_awq_cannot_do_is_refused(tmp_path, tiny_opt, scheme, options, words):
    with pytest.raises(UserError, match=words):
        figures(tmp_path, tiny_opt, scheme, {"awq": options, "rtn": {}})
