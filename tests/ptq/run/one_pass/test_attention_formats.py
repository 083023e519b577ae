"""Formats inside attentions and of the cache, in one pass over the checkpoint: the bits of passes one after another, nothing read twice."""

import pytest

from ptq.errors import UserError
from ptq.run.experiment import run
from ptq.testing import random_tiny
from tests.tools.one_pass import GROUPS, ends_with_the_same_bits, exported, make, name_at, same_export
from tests.tools.ranks import in_world, run_ranks
from tests.tools.same_bits import results, same

WEIGHTS = {"weight": {"bits": 4}}
CACHE = {
    "key": {"bits": 2, "granularity": "channel", "symmetric": False, "dynamic": True},
    "value": {"bits": 3, "granularity": "token", "symmetric": False, "dynamic": True},
    "cache": {"window": 8, "first": 2, "tokens": 8},
}
UNTURNED = {**CACHE, "cache": {**CACHE["cache"], "before_rope": True}}
DYNAMIC = {"bits": 4, "granularity": "token", "dynamic": True}
STATIC = {"bits": 8, "granularity": "tensor", "dynamic": False}
FP8 = {"format": "fp8_e4m3", "granularity": "tensor", "dynamic": False, "bits": 8}
CASES = {
    "a cache": ("tiny_llama", WEIGHTS | CACHE, {"rtn": {}}, None),
    "keys before their rotary embeddings": ("tiny_llama", WEIGHTS | UNTURNED, {"smooth": {}, "gptq": {"target": "residual"}}, None),
    "turned queries and keys": ("tiny_llama", {**WEIGHTS, **CACHE, "query": DYNAMIC}, {"rotate": {"online": ["down", "heads"]}, "gptq": {}}, None),
    "inside attentions": ("tiny_opt", WEIGHTS | {"query": DYNAMIC, "attention_probs": {**STATIC, "symmetric": False}, "value": STATIC}, {"gptq": {}}, None),
    "a mixture with a cache": ("tiny_mixtral", GROUPS | UNTURNED, {"awq": {}, "gptq": {}}, None),
    "a cache that is exported": ("tiny_llama", {"weight": FP8, "input": FP8, "key": FP8, "value": FP8}, {"rtn": {}}, "compressed-tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_pass_has_the_bits_of_several_and_reads_each_tensor_once(tmp_path, request, monkeypatch, read, case):
    name, scheme, steps, export = CASES[case]
    model = request.getfixturevalue(name)
    save = export is None
    one = run(make(tmp_path / "one", model, steps, export, scheme, save=save))
    names = {place: name for place in read if "layers" in (name := name_at(model, place))}
    assert len(names) > 20 and {read[place] for place in names} == {1}
    monkeypatch.setattr("ptq.run.experiment.goes_in_one_pass", lambda *args: False)
    several = run(make(tmp_path / "several", model, steps, export, scheme, save=save))
    a, b = results(one), results(several)
    same((*a[:2], a[2] if save else {}), (*b[:2], b[2] if save else {}))
    if export is not None:
        found = exported(one, export)
        same_export(found, exported(several, export))
        assert any("k_scale" in key for key in found[0])


def test_a_run_killed_in_the_middle_knows_the_layouts_that_it_had_found(tmp_path, tiny_llama, monkeypatch, capsys):
    case = tiny_llama, {"gptq": {}}, None, WEIGHTS | UNTURNED
    ends_with_the_same_bits(tmp_path, monkeypatch, capsys, *case)


def test_two_ranks_quantize_a_cache_in_one_pass_as_one_does(tmp_path, tiny_llama, one_thread):
    case = tiny_llama, {"gptq": {}}, None, WEIGHTS | UNTURNED
    expected = run(make(tmp_path / "1", *case, save=True, device="cpu"))
    recipe = make(tmp_path / "2", *case, save=True, device="cpu")
    ended = run_ranks(2, in_world(lambda world: run(recipe, world=world) and None), tmp_path / "out")
    assert [e.status for e in ended] == [0, 0], ended
    (found,) = (tmp_path / "2" / "outputs" / "once").iterdir()
    same(results(found), results(expected))


def test_a_model_that_needs_values_to_run_is_looked_at_in_a_pass_of_its_own(tmp_path, tiny_llama, monkeypatch, capsys):
    case = tiny_llama, {"rtn": {}}, None, WEIGHTS | CACHE
    expected = run(make(tmp_path / "1", *case, save=True))

    def refused(network):
        raise RuntimeError("no values")

    monkeypatch.setattr("ptq.run.one_pass.quantize.interface_attentions", refused)
    capsys.readouterr()
    found = run(make(tmp_path / "2", *case, save=True))
    assert "attentions: found in a pass of its own" in capsys.readouterr().out
    same(results(found), results(expected))


def test_an_attention_that_cannot_be_reached_is_refused_before_a_block_is_read(tmp_path):
    random_tiny("falcon").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"scheme\.key: this model's attention does not use transformers'"):
        run(make(tmp_path, tmp_path / "model", {"rtn": {}}, None, WEIGHTS | CACHE))
