"""What calibration samples show to experts: counted, and made more of where a router sends few."""

import pytest
import torch

from ptq.config.building import recipe_from
from ptq.config.checking import check
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.experts.routing import ExpertTokens
from ptq.network.network import build_network
from ptq.run.in_memory import quantize
from ptq.run.session import check_experts
from ptq.testing import random_tiny
from quantize.spec.quant_spec import QuantSpec

SAMPLES, LENGTH, EXPERTS, CHOSEN = 5, 12, 6, 2
SCHEME = SchemeConfig(weight=QuantSpec(bits=3, granularity="channel"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 60, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(4))


def _shown(architecture, mode, ids, batch_size=2):
    """Hidden states after all blocks, what experts saw, and how many rows each expert's first Linear was given."""
    network = build_network(random_tiny(architecture))
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    stream.experts = mode
    rows: dict[str, int] = {}
    for block in network.blocks:
        for expert, names in block.experts.items():
            block.linears[names[0]].register_forward_pre_hook(
                lambda m, a, expert=expert: rows.__setitem__(expert, rows.get(expert, 0) + len(a[0]))
            )
    flow = stream.calibration(ids, batch_size)
    stream.run([flow], Nothing())
    return flow.hidden, flow.experts, rows


@pytest.mark.parametrize("mode", ["routed", "all", "at-least-40"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "qwen2_moe"])
def test_the_counts_are_what_the_experts_are_given_and_the_output_stays(architecture, mode, ids):
    plain, _, _ = _shown(architecture, "routed", ids)
    hidden, tokens, rows = _shown(architecture, mode, ids)
    # A product of more rows may round otherwise.
    torch.testing.assert_close(hidden, plain, rtol=1e-5, atol=1e-6)
    found = {expert: tokens.of(expert) for expert in rows}
    assert {expert: seen for expert, (_, seen) in found.items()} == rows
    for holder, routed in tokens.routed.items():
        assert int(routed.sum()) == SAMPLES * LENGTH * CHOSEN
        seen = tokens.seen[holder]
        assert bool((seen >= routed).all())
        assert mode != "all" or seen.tolist() == [SAMPLES * LENGTH] * EXPERTS
        assert mode != "at-least-40" or int(seen.min()) >= 40
        assert mode != "routed" or torch.equal(seen, routed)


def test_the_batch_size_changes_no_experts_tokens(ids):
    one, many = (_shown("qwen3_moe", "at-least-20", ids, size)[1] for size in (1, 5))
    # Which tokens fill up where others are wanted depends on the batch; what is asked for does not.
    assert all(torch.equal(one.routed[holder], many.routed[holder]) for holder in one.routed)
    assert all(int(counts.min()) >= 20 for tokens in (one, many) for counts in tokens.seen.values())


def test_starved_experts_are_named_with_their_tokens_and_rounded_to_nearest():
    ids = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(4))
    model = random_tiny("qwen3_moe")
    result = quantize(model, SCHEME, {"gptq": {}}, ids, 1)
    unreached = [layer for layer in result.layers if layer.tokens == 0]
    assert unreached, "six tokens cannot reach six experts of two blocks"
    for layer in unreached:
        assert any(
            layer.name in note and "no token reached it: rounded to nearest instead" in note for note in result.notes
        )
    [line] = [note for note in result.notes if note.startswith("model.layers.0: ") and "experts saw fewer" in note]
    assert "(0)" in line and "calibration.experts=all" in line
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())


WEIGHT = QuantSpec(bits=4, granularity="channel")
DYNAMIC = SchemeConfig(weight=WEIGHT, input=QuantSpec(bits=8, granularity="token", dynamic=True))
STATIC = SchemeConfig(weight=WEIGHT, input=QuantSpec(bits=8, symmetric=False))
GPTQ = {"gptq": {"target": "residual", "held_out": 2, "scales": "pivots", "descent": 1}}


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [
        (STATIC, {"smooth": {"search": True}, "gptq": {}}),
        (DYNAMIC, {"awq": {}, "rtn": {}}),
        (DYNAMIC, {"clip": {}, **GPTQ}),
        (DYNAMIC, {"wush": {}, **GPTQ}),
        (DYNAMIC, {"affine": {"steps": 2}, "rtn": {}}),
        (DYNAMIC, {"rotate": {}, **GPTQ}),
        (DYNAMIC, {"autoround": {"steps": 2}}),
        (DYNAMIC, {"omniquant": {"steps": 2}}),
        (DYNAMIC, {"lowrank": {"rank": 2}}),
        (DYNAMIC, {"hqq": {}}),
        (DYNAMIC, {"gptq": {}, "tune": {"steps": 1}}),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_starved_experts_are_in_the_way_of_no_method(scheme, steps):
    # Tokens that are all the same go to the same two of six experts.
    ids = torch.full((4, 3), 5)
    model = random_tiny("qwen3_moe")
    quantize(model, scheme, steps, ids, 1)
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())


def test_an_expert_whose_weights_hold_nan_ends_the_run_in_one_line(ids):
    model = random_tiny("mixtral")
    model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    with pytest.raises(UserError, match=r"^model.layers.1.mlp.experts.2.down_proj[^\n]*NaN[^\n]*$"):
        quantize(model, SCHEME, {"rtn": {}}, ids, 2)


@pytest.mark.parametrize("value", ["everything", "at-least-", "at-least-0", "at-least-x", "al"])
def test_another_word_for_what_experts_see_is_refused_with_the_known_ones(value):
    with pytest.raises(UserError, match="calibration.experts: .* expected routed, all or at-least-N"):
        check(recipe_from({"name": "x", "model": {"path": "x"}, "calibration": {"experts": value}}))


@pytest.mark.parametrize(
    ("architecture", "asked", "said"),
    [("llama", "all", "has no mixture of experts"), ("jetmoe", "all", "is not seen: use routed")],
)
def test_what_experts_cannot_be_shown_is_refused_before_the_work(architecture, asked, said):
    recipe = recipe_from({"name": "x", "model": {"path": "x"}, "calibration": {"experts": asked}})
    with pytest.raises(UserError, match=said):
        check_experts(recipe, build_network(random_tiny(architecture)))


def test_a_quota_is_shared_out_among_samples_and_rounded_up():
    assert ExpertTokens("at-least-40", 16, 8).quota == 3 and ExpertTokens("all", 16, 8).quota == 0
