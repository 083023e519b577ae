"""What a result says of attention tensors is what ran: with a solver from outside, with none, and with layers left out."""

import pathlib
import re

import pytest

from ptq.errors import UserError
from tests.tools.tiny_runs import tiny_run

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "writing-a-method.md"
QUERY = {"bits": 2, "granularity": "token", "symmetric": False, "dynamic": True}


def metrics(tmp_path, model, steps, **scheme):
    return tiny_run(tmp_path, model, {"weight": {"bits": 8}, **scheme}, steps).metrics


def row(figures, tensor):
    return [
        {k: v for k, v in kind.items() if k != "seconds"} for kind in figures["tensors"] if kind["tensor"] == tensor
    ]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The solver of the documentation, as it stands, in a file of its own."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    (tmp_path / "my_method.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"mine": {"_target_": "my_method.Step", "ratio": 1.0}}


@pytest.mark.parametrize("tensor", ["query", "key", "value", "attention_probs"])
def test_a_solver_from_outside_quantizes_attention_as_rtn_does_and_the_result_says_the_same(
    tmp_path, tiny_llama, outside, tensor
):
    spec = {**QUERY, "bits": 3}
    plain = metrics(tmp_path, tiny_llama, outside)
    ours = metrics(tmp_path, tiny_llama, {"rtn": {}}, **{tensor: spec})
    theirs = metrics(tmp_path, tiny_llama, outside, **{tensor: spec})
    assert theirs["kl_mean"] == ours["kl_mean"] > 3 * plain["kl_mean"]
    assert row(theirs, tensor) == row(ours, tensor) != row(plain, tensor)


def test_without_a_solver_no_result_says_that_attention_was_quantized(tmp_path, tiny_llama):
    try:
        found = metrics(tmp_path, tiny_llama, {}, query=QUERY)
    except UserError:
        return  # refused: nothing would have quantized anything
    unquantized = metrics(tmp_path, tiny_llama, {"rtn": {}})
    assert found["kl_mean"] == 0 and row(found, "query") == row(unquantized, "query")


def test_layers_left_out_are_not_counted_among_the_quantized(tmp_path, tiny_llama):
    override = {"modules": "*.layers.[12].*", "tensors": {"query": None}}
    every = metrics(tmp_path, tiny_llama, {"rtn": {}}, query=QUERY)
    half = metrics(tmp_path, tiny_llama, {"rtn": {}}, query=QUERY, overrides=[override])
    assert half["kl_mean"] < every["kl_mean"] and row(half, "query") != row(every, "query")
