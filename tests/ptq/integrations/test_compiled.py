"""Decoding that is compiled says what kernels say; what it needs is said before."""

import copy
import gc

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from ptq.errors import UserError
from ptq.integrations.compiled import compile_decode_, compile_prompts_, missing
from ptq.integrations.kernels import use_kernels_
from ptq.integrations.transformers import PtqConfig
from ptq.testing import random_tiny
from quantize.modules.packed import PackedLinear

IDS = torch.arange(1, 17)[None] % 60
COMPILER = pytest.mark.skipif(missing() is not None, reason=f"torch.compile: {missing()}")


def load(path, scheme=None, specs=None):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=PtqConfig(scheme=scheme, specs=specs))


def save_one_block(folder):
    whole = random_tiny("llama")
    whole.model.layers = whole.model.layers[:1]
    whole.config.num_hidden_layers = 1
    whole.save_pretrained(folder)


@COMPILER
@torch.no_grad()
def test_compiled_decoding_gives_the_tokens_of_kernels_by_one_graph(tmp_path):
    save_one_block(tmp_path)
    model = load(tmp_path, "w8a8")
    expected = model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    compile_decode_(model)
    torch._dynamo.reset()
    counters.clear()
    found = model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # A model of the same class and other codes has a graph of its own, and so has a copy.
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, PackedLinear):
            module.store(-2 * module.dequantized())
    use_kernels_(other, "simulated")
    plain = other.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, disable_compile=True)
    assert not torch.equal(plain, expected)
    assert torch.equal(other.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False), plain)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False), expected)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False), expected)


@COMPILER
@torch.no_grad()
def test_compiled_prompts_of_whatever_length_are_one_graph_around_the_kernels_products(tmp_path):
    save_one_block(tmp_path)
    token = {"bits": 8, "granularity": "token", "dynamic": True}
    model = load(tmp_path, specs={"weight": {"bits": 8}, "input": token, "head": {"bits": 8}})
    prompts = [IDS, IDS[:, :5], IDS.flip(1)[:, 3:]]
    expected = [model(ids, use_cache=False).logits for ids in prompts]
    one = model(IDS[:, :1], use_cache=False).logits
    torch._dynamo.reset()
    compile_prompts_(model)
    counters.clear()
    called = []
    for linear in model.modules():
        if isinstance(linear, PackedLinear) and linear._kernel is not None:
            run = linear._kernel.run
            linear._kernel.run = lambda given, rows, run=run: called.append(rows) or run(given, rows)
    for ids, logits in zip(prompts, expected, strict=True):
        # Rounding around the products may move a code of the input by one, as it does between two machines.
        assert (model(ids, use_cache=False).logits - logits).norm() < 0.02 * logits.norm()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert {16, 5, 13} <= set(called)
    assert torch.equal(model(IDS[:, :1], use_cache=False).logits, one)
    assert torch.equal(model(IDS[:, :1], torch.ones(1, 1), use_cache=False).logits, one)  # A mask by its place.
    assert counters["stats"]["unique_graphs"] == 1  # One token passes as before.
    other = copy.deepcopy(model)
    assert torch.equal(other(prompts[0], use_cache=False).logits, expected[0])  # A copy is not compiled.
    for linear in model.modules():
        if isinstance(linear, PackedLinear):
            linear.store(-2 * linear.dequantized())
    gc.collect()
    with pytest.raises(RuntimeError, match="weights that have been changed or moved since: compile it again"):
        model(IDS, use_cache=False)
    compile_prompts_(model)
    changed = copy.deepcopy(model)(IDS, use_cache=False).logits
    assert (model(IDS, use_cache=False).logits - changed).norm() < 0.02 * changed.norm()


def test_without_a_compiler_or_generate_the_reason_is_said(tiny_llama, monkeypatch):
    for compile_ in (compile_decode_, compile_prompts_):
        with pytest.raises(UserError, match="compile: Linear has no generate"):
            compile_(torch.nn.Linear(2, 2))
    model = load(tiny_llama, "w8a8")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"compile: no C\+\+ compiler is there, looked for g\+\+, .*: install g\+\+"):
        compile_decode_(model)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="looked for no-such-compiler"):
        compile_prompts_(model)
    monkeypatch.undo()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no/such/folder")
    assert missing() is None or "Python.h is not there: install Python's headers" in missing()
    assert model.generation_config.compile_config is None
