"""Low-rank correction on tiny trained models: it helps, is counted, is kept in what is saved."""

import pytest
import torch

from ptq.errors import UserError
from quantize.modules.packed import PackedLinear
from quantize.modules.simulated import QuantLinear
from quantize.spec.quant_spec import QuantSpec
from tests.ptq.steps.test_solvers import figures

GROUPS = {"bits": 2, "granularity": "group", "group_size": 32, "symmetric": False}


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_a_correction_of_greater_rank_loses_less_and_its_bits_are_counted(tmp_path, tiny_llama, solver):
    found = [figures(tmp_path, tiny_llama, {"weight": GROUPS}, {solver: {}})[0]]
    for rank in (2, 16):
        options = {"rank": rank, "solver": solver}
        found.append(figures(tmp_path, tiny_llama, {"weight": GROUPS}, {"lowrank": options})[0])
    losses, bits = [m["kl_mean"] for m in found], [m["size"]["bits_per_weight"] for m in found]
    assert losses[0] > losses[1] > losses[2] and bits[0] < bits[1] < bits[2]
    # A weight (out, in) costs 16 r (out + in) bits more.
    assert bits[2] - bits[0] == pytest.approx(8 * (bits[1] - bits[0]), rel=1e-3)


def test_more_rounds_are_never_worse_by_much_and_other_formats_are_corrected_too(tmp_path, tiny_llama):
    nvfp4 = {"format": "nvfp4", "bits": 4, "granularity": "group", "group_size": 16}
    plain = figures(tmp_path, tiny_llama, {"weight": nvfp4}, {"rtn": {}})[0]["kl_mean"]
    for rounds in (1, 3):
        options = {"rank": 8, "rounds": rounds}
        assert figures(tmp_path, tiny_llama, {"weight": nvfp4}, {"lowrank": options})[0]["kl_mean"] < 0.7 * plain


def test_a_killed_run_builds_corrected_blocks_again_with_the_same_figures(tmp_path, tiny_llama, monkeypatch):
    from ptq.run import quantize_visitor

    whole = figures(tmp_path, tiny_llama, {"weight": GROUPS}, {"lowrank": {"rank": 4}})[0]
    original, seen = quantize_visitor.QuantizeVisitor.enter, []

    def enter(self, block):
        seen.append(block.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(self, block)

    monkeypatch.setattr(quantize_visitor.QuantizeVisitor, "enter", enter)
    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        figures(again, tiny_llama, {"weight": GROUPS}, {"lowrank": {"rank": 4}})
    resumed = figures(again, tiny_llama, {"weight": GROUPS}, {"lowrank": {"rank": 4}})[0]
    assert resumed["quantized_perplexity"] == whole["quantized_perplexity"]


def test_a_corrected_linear_computes_with_both_and_is_not_packed():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 16, generator=generator), torch.randn(3, 16, generator=generator)
    left, right = (torch.randn(*s, generator=generator).half() for s in ((6, 2), (2, 16)))
    linear = QuantLinear(weight, None, QuantSpec(bits=4))
    plain, before = linear(x), linear.stored_bytes()
    linear.correct(left, right)
    expected = plain + x @ right.float().t() @ left.float().t()
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    assert linear.stored_bytes() - before == 2 * 2 * (6 + 16)
    assert linear.to(torch.bfloat16).left.dtype == torch.float16
    with pytest.raises(ValueError, match="correction of low rank"):
        PackedLinear.from_quantized(linear)
    with pytest.raises(ValueError, match="once"):
        linear.correct(left, right)
    with pytest.raises(ValueError, match="do not make"):
        QuantLinear(weight, None, QuantSpec(bits=4)).correct(left, right[:, :5])


@pytest.mark.parametrize(
    ("options", "scheme", "changes", "words"),
    [
        ({"rank": 0}, {"weight": GROUPS}, {}, "steps.lowrank.rank: 0"),
        ({"solver": "gptk"}, {"weight": GROUPS}, {}, "steps.lowrank.solver: 'gptk' .*gptq"),
        ({}, {"input": {"bits": 8, "granularity": "token", "dynamic": True}}, {}, "scheme.weight: null, so steps.lowrank"),
        ({}, {"weight": {"bits": 8}}, {"export": {"format": "gguf"}}, "no place for the products of low rank that steps.lowrank adds"),
    ],
)  # fmt: skip
def test_what_a_correction_cannot_do_is_refused(tmp_path, tiny_llama, options, scheme, changes, words):
    with pytest.raises(UserError, match=words):
        figures(tmp_path, tiny_llama, scheme, {"lowrank": options}, **changes)
