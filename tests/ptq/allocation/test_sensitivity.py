"""ptq sensitivity: what it predicts is what happens, for every format at once; what it leaves; what it refuses."""

import csv
import dataclasses
import json

import pytest
import torch
import transformers

from ptq.allocation import sensitivity
from ptq.allocation.candidates import candidate, stored_bytes
from ptq.allocation.one_at_a_time import one_at_a_time, rank_correlation
from ptq.allocation.sensitivity import Sensitivity, measure, open_forward
from ptq.allocation.sensitivity_run import run_sensitivity, with_samples
from ptq.calibration import fisher
from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.errors import UserError
from ptq.run.experiment import checked
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from ptq.testing import byte_tokenizer, random_tiny
from quantize.codecs.registry import codec_of
from quantize.grid.affine import dequantize, grouped
from quantize.modules.simulated import QuantLinear
from quantize.solvers import gptq
from quantize.solvers.gptq import GptqOptions, Hessian, solve
from quantize.spec.quant_spec import QuantSpec

FORMATS = ("int2_g32", "int3_g32", "int4_g32", "int8_g32", "fp4_g32")


def make(tmp_path, model, samples=8, **changes):
    """A recipe of 4-bit weights on a local model."""
    base = {
        "name": "tiny",
        "model": {"path": str(model)},
        "calibration": {"samples": samples, "length": 64},
        "evaluation": {"windows": 4, "length": 64},
        "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 32}},
        "steps": {"rtn": {}},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
        "execution": {"device": "cpu"},
    }
    return recipe_from({**base, **changes})


def specs(*names):
    """The formats by name."""
    return {name: candidate(name) for name in names}


@pytest.fixture
def session_of():
    """A function that opens a session of a recipe and carries its samples forward."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def opened(recipe):
            recipe, steps = checked(recipe)
            session = stack.enter_context(open_session(recipe, Journal()))
            return session, open_forward(session, steps)

        yield opened


def test_the_prediction_ranks_linears_as_rounding_each_alone_does(tmp_path, tiny_llama, session_of):
    session, forward = session_of(make(tmp_path, tiny_llama, samples=16))
    found = measure(session, forward, specs("int3_g32"))
    alone = one_at_a_time(session, forward, found.formats)
    assert found.costs.keys() == alone.keys() and len(alone) == 4 * 7
    for form in found.formats:
        assert rank_correlation(found.costs, alone, form) >= 0.9
        assert 0.5 < found.uniform_cost(form) / sum(costs[form] for costs in alone.values()) < 2


@pytest.mark.parametrize(("samples", "batch"), [(3, 1), (8, 2), (16, 4), (32, 4)])
def test_samples_pass_back_in_batches_of_the_recipe_and_in_four_of_them_at_least(
    tmp_path, tiny_llama, session_of, samples, batch
):
    _, forward = session_of(make(tmp_path, tiny_llama, samples=samples))
    assert forward.flow.batch_size == batch


def test_one_at_a_time_is_the_divergence_of_the_whole_model_with_that_weight_rounded(tmp_path, tiny_llama, session_of):
    session, forward = session_of(make(tmp_path, tiny_llama, samples=2))
    spec = candidate("int3")
    found = one_at_a_time(session, forward, {"int3": spec})
    ids = forward.flow.ids
    # The baseline's weights are rounded to fp16.
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).float()
    with torch.no_grad():
        before = model(ids).logits[:, :-1].log_softmax(-1)
        for name in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
            linear = model.get_submodule(name)
            kept = linear.weight.clone()
            linear.weight.copy_(codec_of(spec).fake_weight(kept, spec))
            after = model(ids).logits[:, :-1].log_softmax(-1)
            linear.weight.copy_(kept)
            kl = (before.exp() * (before - after)).sum(-1).mean()
            assert found[name]["int3"] == pytest.approx(float(kl), rel=2e-3)


def test_all_formats_share_one_backward_pass_and_each_costs_what_it_costs_alone(
    tmp_path, tiny_llama, session_of, monkeypatch
):
    session, forward = session_of(make(tmp_path, tiny_llama, samples=2))
    calls = []
    original = fisher.output_gradients
    monkeypatch.setattr("ptq.allocation.sensitivity.output_gradients", lambda *a: calls.append(1) or original(*a))
    together = measure(session, forward, specs(*FORMATS))
    assert len(calls) == 1
    alone = measure(session, forward, specs("fp4_g32"))
    assert {n: c["fp4_g32"] for n, c in together.costs.items()} == {n: c["fp4_g32"] for n, c in alone.costs.items()}
    for costs in together.costs.values():
        assert costs["int2_g32"] > costs["int3_g32"] > costs["int4_g32"] > costs["int8_g32"] > 0


def test_offloaded_weights_and_hidden_states_on_disk_give_the_same_bits(tmp_path, tiny_llama, session_of):
    found = []
    for execution in ({}, {"weights": "offloaded", "hidden_states": "disk"}):
        session, forward = session_of(make(tmp_path, tiny_llama, samples=2, execution=execution))
        found.append(measure(session, forward, specs("int4_g32")))
    assert found[0] == found[1]


GPTQ = {"gptq": {"damping": 0.02}}


def test_of_a_solver_what_it_makes_of_each_weight_is_measured(tmp_path, tiny_llama, monkeypatch):
    """GPTQ's own errors, which are smaller: the prediction ranks them as quantizing each Linear alone by GPTQ does."""
    recipe, steps = checked(make(tmp_path, tiny_llama, samples=16, steps=GPTQ))
    with open_session(recipe, Journal()) as session:
        forward = open_forward(session, steps, solved=4)
        found = measure(session, forward, specs("int3_g32", "fp4_g32"))
        alone = one_at_a_time(session, forward, found.formats)
        nearest = measure(session, dataclasses.replace(forward, solving=None), specs("int3_g32"))
        # The very weight that GPTQ gives of the block's inputs, by itself, on samples that no error is measured on.
        block = session.network.blocks[1]
        name = "model.layers.1.mlp.down_proj"
        inputs = []
        module = session.network.model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
        with torch.no_grad():
            session.network.model(session.calibration_tokens().ids[12:], use_cache=False)
        hook.remove()
        hessian = Hessian(module.weight.shape[1])
        hessian.update(inputs[0])
        solved = solve(module.weight, hessian.matrix, candidate("int3_g32"), GptqOptions(damping=0.02))
        spec = candidate("int3_g32")
        values = dequantize(grouped(solved.codes, spec), solved.grid).reshape(module.weight.shape)
        made = forward.quantize(specs("int3_g32"))(block)[name]["int3_g32"]
    # Another order of sums may take a rounding to the other side; few weights are there.
    assert (made - values).abs().gt(1e-6).float().mean() < 0.01
    assert found.solver == "gptq" and nearest.solver is None and found.tokens == 12 * 63
    assert found.uniform_cost("int3_g32") < 0.8 * nearest.uniform_cost("int3_g32")
    for form in found.formats:
        assert rank_correlation(found.costs, alone, form) >= 0.9
        assert 0.5 < found.uniform_cost(form) / sum(costs[form] for costs in alone.values()) < 2


def test_rounding_with_searched_scales_costs_less_than_without(tmp_path, tiny_llama):
    recipe, steps = checked(make(tmp_path, tiny_llama, samples=4, steps={"rtn": {"scales": "block"}}))
    with open_session(recipe, Journal()) as session:
        forward = open_forward(session, steps, solved=2)
        found = measure(session, forward, specs("int3_g32", "nf4"))
        plain = measure(session, dataclasses.replace(forward, solving=None), specs("int3_g32", "nf4"))
    assert found.solver == "rtn"
    for form in found.formats:
        assert found.uniform_cost(form) < plain.uniform_cost(form)


def test_a_hessian_is_factorised_once_for_all_formats_and_for_linears_that_share_it(tmp_path, tiny_llama, monkeypatch):
    calls = []
    original = gptq.factorise
    monkeypatch.setattr(gptq, "factorise", lambda *a: calls.append(1) or original(*a))
    recipe, steps = checked(make(tmp_path, tiny_llama, samples=2, steps=GPTQ))
    with open_session(recipe, Journal()) as session:
        forward = open_forward(session, steps, solved=1)
        together = measure(session, forward, specs("int2_g32", "int3_g32", "int4"))
        assert len(calls) == 4 * 4
        alone = measure(session, forward, specs("int4"))
    for name, costs in together.costs.items():
        assert costs["int4"] == pytest.approx(alone.costs[name]["int4"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "samples", "by_solver", "expected"),
    [(128, None, False, (16, 0)), (8, None, False, (8, 0)), (128, None, True, (64, 48)), (16, None, True, (16, 8)),
     (16, 16, True, (32, 16)), (64, 8, True, (32, 24)), (1, None, True, (2, 1))],
)  # fmt: skip
def test_a_solver_has_samples_of_its_own(given, samples, by_solver, expected):
    recipe = recipe_from({"name": "x", "model": {"path": "y"}, "calibration": {"samples": given}})
    found, solved = with_samples(recipe, samples, by_solver)
    assert (found.calibration.samples, solved) == expected


def test_a_solver_that_weighs_nothing_is_no_choice_and_what_was_measured_is_kept_apart(tmp_path, tiny_llama, capsys):
    with pytest.raises(UserError, match="--rounding: solver"):
        run_sensitivity(make(tmp_path, tiny_llama), ("int4_g32",), True, samples=1, by_solver=True)
    recipe = make(tmp_path, tiny_llama, steps=GPTQ)
    found = [run_sensitivity(recipe, ("int4_g32",), True, samples=2, by_solver=by)[0] for by in (False, True, True)]
    assert found[0].costs != found[1].costs and found[1] == found[2]
    out = capsys.readouterr().out
    assert out.count("read from the store") == 1 and "costs: of what steps.gptq makes of weights" in out


def test_transforms_of_the_recipe_count(tmp_path, tiny_llama_outliers, session_of):
    """Outlying channels that a rotation spreads over all others make what writes to the stream costly to round: seen by both."""
    plain = session_of(make(tmp_path, tiny_llama_outliers, samples=2))
    turned = session_of(make(tmp_path, tiny_llama_outliers, samples=2, steps={"rotate": {}, "rtn": {}}))
    costs = [measure(*opened, specs("int4")) for opened in (plain, turned)]
    alone = one_at_a_time(*turned, specs("int4"))
    assert costs[1].uniform_cost("int4") > 5 * costs[0].uniform_cost("int4")
    assert rank_correlation(costs[1].costs, alone, "int4") >= 0.9


def test_linears_that_runtimes_keep_in_one_format_are_grouped(tmp_path, tiny_llama, tiny_mixtral, session_of):
    session, forward = session_of(
        make(tmp_path, tiny_llama, samples=1, scheme={"weight": {}, "exclude": ["*.1.mlp.*"]})
    )
    found = measure(session, forward, specs("int4"))
    assert found.groups[:4] == tuple(
        tuple(f"model.layers.0.{name}" for name in names)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    )
    assert [name for group in found.groups for name in group] == list(found.costs)
    assert not any(".1.mlp." in name for name in found.costs)
    session, forward = session_of(make(tmp_path, tiny_mixtral, samples=1))
    groups = measure(session, forward, specs("int4")).groups
    experts = [group for group in groups if any("experts" in name for name in group)]
    assert len(experts) == len(session.network.blocks)
    assert all(len(group) == len([n for n in block.linears if "experts" in n]) for group, block in zip(experts, session.network.blocks, strict=True))  # fmt: skip


@pytest.mark.parametrize("name", ["int3", "int4_g32", "int4_g32_asym", "int8_tensor", "int2_g64", "nf4", "fp4_g32", "mxfp4", "nvfp4", "fp8_e4m3", "q8_0"])  # fmt: skip
def test_bytes_are_those_of_the_module_that_a_run_makes(name):
    spec, weight = candidate(name), torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    assert stored_bytes((48, 128), spec) == QuantLinear(weight, None, spec).stored_bytes()


def test_integer_formats_are_like_the_recipes():
    base = QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False, range="mse", scales="float16_min")
    assert candidate("int3_g32", base) == QuantSpec(bits=3, granularity="group", group_size=32, symmetric=False, range="mse", scales="float16_min")  # fmt: skip
    assert candidate("int8", base).scales == "float16" and candidate("int4_sym", base).symmetric
    assert candidate("int4_g32", QuantSpec(format="nf4", bits=4, granularity="group", group_size=64)) == QuantSpec(bits=4, granularity="group", group_size=32)  # fmt: skip


@pytest.mark.usefixtures("drawn")
def test_the_command_leaves_tables_and_a_picture_and_the_second_time_reads_the_store(
    tmp_path, tiny_llama, capsys, monkeypatch
):
    folder = tmp_path / "out"
    found, place = run_sensitivity(make(tmp_path, tiny_llama), FORMATS, True, samples=2, check=True, output=folder)
    assert place == folder
    rows = list(csv.DictReader((folder / "sensitivity.csv").open()))
    assert len(rows) == 28 * 5
    row = next(r for r in rows if r["name"] == "model.layers.1.mlp.up_proj" and r["format"] == "int3_g32")
    assert float(row["predicted_kl"]) == found.costs[row["name"]]["int3_g32"] and float(row["bits_per_weight"]) == 4
    assert (row["block"], row["linear"]) == ("1", "mlp.up_proj") and float(row["one_at_a_time_kl"]) > 0
    facts = json.loads((folder / "sensitivity.json").read_text())
    assert facts["sensitivity"]["tokens"] == found.tokens == 2 * 63
    assert (folder / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("ptq.allocation.sensitivity.open_forward", None)
    again, _ = run_sensitivity(make(tmp_path, tiny_llama), FORMATS, True, samples=2, output=tmp_path / "again")
    assert again == found and isinstance(again, Sensitivity)
    out = capsys.readouterr().out
    assert "the Linears that hurt most" in out and "rank correlation" in out and "read from the store" in out


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("int4_g33",), "does not divide"),
        (("int9",), "no format"),
        (("nf5",), "did you mean 'nf4'"),
        (("llm_int8",), "weight"),
        (("int4_g32", "int4_g32_sym"), "int4_g32 once more"),
    ],
)
def test_formats_that_make_no_sense_are_refused_in_a_line(tmp_path, tiny_llama, names, line):
    with pytest.raises(UserError, match="--formats") as error:
        run_sensitivity(make(tmp_path, tiny_llama), names, True, samples=1)
    assert line in str(error.value)


def test_the_command_line_says_what_it_cannot_use(tmp_path, tiny_llama, capsys):
    where = ["--config", "demo", f"outputs={tmp_path}/o", f"store={tmp_path}/s"]
    for words, line in (
        (["sensitivity"], "--config"),
        (["sensitivity", *where, "--formats", ","], "--formats: ',' names none"),
        (["sensitivity", *where, "--samples", "0"], "--samples: 0 is too small"),
        (["sensitivity", *where, "--rounding", "gptq"], "--rounding"),
        (["sensitivity", *where, "--chek"], "--chek: no such option"),
        (["sensitivity", *where, "scheme.weight=null"], "scheme.weight: null"),
    ):
        assert main(words) == 2
        assert line in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_embedding_and_head_cost_what_plain_autograd_says(tmp_path, kind, session_of, monkeypatch):
    monkeypatch.setattr(sensitivity, "gradients_dtype", lambda *_: None)
    tokenizer, random = byte_tokenizer(), random_tiny(kind)
    random.resize_token_embeddings(len(tokenizer))
    random.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    spec = {"bits": 4, "granularity": "group", "group_size": 4}
    session, forward = session_of(make(tmp_path, tmp_path / "model", samples=3, scheme={"weight": spec, "embedding": spec, "head": spec}))  # fmt: skip
    found = measure(session, forward, {"int4": QuantSpec(**spec)}, seed=7)
    model, ids = session.network.model, forward.flow.ids
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    assert list(found.outside.values()) == ([("embedding", "head")] if tied else [("embedding",), ("head",)])
    assert found.groups[-len(found.outside) :] == tuple((name,) for name in found.outside)
    # The two uses of the tied weight are told apart by giving the head a tensor of its own.
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    embedding.weight.requires_grad_(True)
    generator, total = torch.Generator().manual_seed(7), 0
    weights = [embedding.weight.detach(), head.weight.detach()]
    errors = [codec_of(QuantSpec(**spec)).fake_weight(w, QuantSpec(**spec)) - w for w in weights]
    for sample in ids:
        logits = model(input_ids=sample[None], use_cache=False).logits[:, :-1]
        v = fisher.fisher_root(logits.detach(), generator)
        gradients = torch.autograd.grad((logits * v).sum(), [embedding.weight, head.weight])
        total += sum(float((e.double() * g.double()).square().sum()) for e, g in zip(errors, gradients, strict=True))
    assert sum(found.costs[name]["int4"] for name in found.outside) == pytest.approx(total / 2 / found.tokens, rel=1e-3)
