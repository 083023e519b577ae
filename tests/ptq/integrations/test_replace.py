"""Linears replaced in place, and back: what is skipped, what is refused with the model as it was, how much memory stands."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from ptq.config.schema import Override, SchemeConfig
from ptq.config.shipped import scheme_named, scheme_names
from ptq.errors import UserError
from ptq.integrations.replace import dequantize_, prepare_, quantize_
from ptq.testing import random_tiny
from quantize.modules.packed import LlmInt8Linear, PackedLinear
from quantize.modules.simulated import QuantLinear
from quantize.spec.quant_spec import QuantSpec, spec_of

IDS = torch.arange(24)[None] % 60
W4 = SchemeConfig(weight=QuantSpec(bits=4, granularity="group", group_size=16))


def packed_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def plain(columns=64):
    torch.manual_seed(0)
    layers = {"first": nn.Linear(columns, 64), "act": nn.ReLU(), "last": nn.Linear(64, 32, bias=False)}
    return nn.Sequential(nn.Sequential(), nn.ModuleDict(layers)).requires_grad_(False)


def state(model):
    """What must not change: the modules by name and type, and every value."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    return [(name, id(module)) for name, module in model.named_modules()], tensors


def assert_refused(model, message, *arguments, **keywords):
    modules, tensors = state(model)
    config = getattr(model, "config", None)
    before = None if config is None else config.to_json_string()
    with pytest.raises(UserError, match=message) as caught:
        quantize_(model, *arguments, **keywords)
    assert "\n" not in str(caught.value)
    now, values = state(model)
    assert now == modules
    assert all(torch.allclose(values[name], tensor, equal_nan=True) for name, tensor in tensors.items())
    assert config is None or config.to_json_string() == before


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "falcon", "bloom", "gpt_neox", "mixtral"])
def test_a_model_computes_what_its_simulated_form_does(architecture):
    model, simulated = random_tiny(architecture), random_tiny(architecture)
    quantize_(model, W4)
    names = packed_names(model)
    assert names
    assert "lm_head" not in names and "embed_out" not in names
    for name in names:
        old = simulated.get_submodule(name)
        weight = old.weight if isinstance(old, nn.Linear) else old.weight.t().contiguous()
        parent, _, child = name.rpartition(".")
        setattr(simulated.get_submodule(parent), child, QuantLinear(weight, old.bias, W4.weight))
    # Falcon's own Linear adds its bias in a step of its own.
    assert torch.allclose(model(IDS).logits, simulated(IDS).logits, atol=1e-5)


def computable(name):
    """Whether a scheme is about Linears alone and needs no calibration."""
    scheme = scheme_named(name)
    attention = (scheme.query, scheme.key, scheme.value, scheme.attention_probs)
    return not any(attention) and (scheme.input is None or scheme.input.dynamic)


@pytest.mark.parametrize("name", [n for n in scheme_names() if not computable(n)])
def test_a_shipped_scheme_with_calibration_or_attention_is_refused(name):
    assert_refused(plain(128), "needs calibration|is no tensor of a Linear", name)


@pytest.mark.parametrize("name", [n for n in scheme_names() if computable(n)])
def test_every_other_shipped_scheme_applies_by_name(name):
    model = plain(128)
    quantize_(model, name, include=["first"])
    [module] = [m for m in model.modules() if isinstance(m, PackedLinear)]
    scheme = scheme_named(name)
    assert (module.weight_spec, module.input_spec) == (scheme.weight, scheme.input)
    assert isinstance(module, LlmInt8Linear) == (name == "llm_int8")
    assert torch.isfinite(module(torch.randn(3, 128))).all()


def test_names_of_schemes_may_be_written_as_people_write_them():
    assert scheme_named("LLM.int8") == scheme_named("llm_int8")
    assert scheme_named("w4a16-g64") == scheme_named("w4a16_g64")


def test_a_scheme_of_ones_own_may_override_by_name_and_leave_some_alone():
    overrides = (Override("*.down_proj", {"weight": None}), Override("*.q_proj", {"weight": QuantSpec(bits=2)}))
    model = random_tiny("llama")
    quantize_(model, SchemeConfig(weight=QuantSpec(bits=4), overrides=overrides))
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert not isinstance(model.model.layers[0].mlp.down_proj, PackedLinear)
    assert model.model.layers[1].self_attn.q_proj.weight_spec.bits == 2
    assert model.model.layers[1].self_attn.k_proj.weight_spec.bits == 4


def test_include_exclude_and_the_filter_choose_by_whole_parts_of_a_name():
    def names(**keywords):
        model = random_tiny("llama")
        quantize_(model, "w8a8", **keywords)
        return packed_names(model)

    assert names(include=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert all(name.startswith("model.layers.1.") for name in names(exclude=["lm_head", "layers.0"]))
    assert len(names(include=["layers.0.mlp"])) == 3
    assert names(filter_fn=lambda module, name: name.endswith("0.mlp.up_proj")) == ["model.layers.0.mlp.up_proj"]
    assert "lm_head" in names(exclude=())


def test_a_linear_that_is_used_twice_is_replaced_in_both_places():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.ReLU()})
    model["c"] = model["a"]
    quantize_(model, "nf4")
    assert model["c"] is model["a"]
    assert isinstance(model["a"], PackedLinear)


def test_what_torch_reads_the_weights_of_directly_is_left_alone():
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 64)).eval()
    quantize_(model, "w8a8")
    assert packed_names(model) == ["1"]
    with torch.no_grad():
        model(torch.randn(2, 5, 64))


def test_a_model_never_stands_in_memory_twice(monkeypatch):
    model = plain()
    old = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    alive = []
    encode = PackedLinear.encode

    def watched(self, weight):
        alive.append(sum(ref() is not None for ref in old))
        return encode(self, weight)

    monkeypatch.setattr(PackedLinear, "encode", watched)
    gc.disable()
    quantize_(model, "w8a8")
    gc.enable()
    assert alive == [2, 1]
    assert all(ref() is None for ref in old)


def test_packed_weights_take_the_memory_of_their_bits():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 512, bias=False))
    count = sum(p.numel() for p in model.parameters())
    quantize_(model, "nf4_dq")
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert 8 * held / count == pytest.approx(4.127, abs=1e-3)


def test_dequantize_gives_plain_linears_that_compute_the_same():
    for architecture in ("llama", "gpt2"):
        model = random_tiny(architecture)
        quantize_(model, W4)
        expected = model(IDS).logits
        dequantize_(model)
        assert not packed_names(model)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
        assert getattr(model.config, "quantization_config", None) is None
        quantize_(model, W4)


def test_dequantize_follows_the_type_of_the_rest_or_the_one_asked_for():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).half()
    quantize_(model, "w8a8")
    other = copy.deepcopy(model)
    dequantize_(model)
    dequantize_(other, torch.bfloat16)
    assert (model[0].weight.dtype, other[0].weight.dtype) == (torch.float16, torch.bfloat16)


def test_on_the_meta_device_packed_linears_are_prepared_and_filled_later():
    full = random_tiny("llama")
    with torch.device("meta"):
        empty = type(full)(full.config)
    quantize_(full, W4)
    prepare_(empty, W4)
    assert all(p.is_meta for p in empty.parameters())
    assert packed_names(empty) == packed_names(full)
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(5, 32)
    assert torch.equal(empty.model.layers[0].mlp.up_proj(x), full.model.layers[0].mlp.up_proj(x))


def test_a_tied_embedding_is_skipped_by_default_and_refused_when_asked_for():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(50, 64), "mid": nn.Linear(64, 64), "out": nn.Linear(64, 50, bias=False)}
    )
    model["out"].weight = model["embed"].weight
    assert_refused(model, "out.weight: is embed.weight too.*exclude", "w8a8", exclude=())
    quantize_(model, "w8a8")
    assert packed_names(model) == ["mid"]
    assert model["out"].weight is model["embed"].weight


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_replaced(value):
    model = random_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    assert_refused(model, r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or inf", "w8a8")


def test_rows_of_zeros_are_no_mistake():
    model = plain()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight[::2] = 0
    zeros = torch.zeros(3, 64)
    for scheme in ("nf4_dq", "w4a16_g64", "llm_int8", "fp8", "mxfp4", "nvfp4", "q8_0"):
        other = copy.deepcopy(model)
        quantize_(other, scheme)
        assert torch.equal(other[1]["first"](zeros), model[1]["first"](zeros))


def tied_linears():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    return model


def integers():
    model = plain()
    model[1]["last"].weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
    return model


def quantized():
    model = plain()
    quantize_(model, "w8a8")
    return model


STATIC = SchemeConfig(weight=QuantSpec(), input=QuantSpec(granularity="tensor"))
ATTENTION = SchemeConfig(weight=QuantSpec(), key=QuantSpec(granularity="token", dynamic=True))
CLUSTER = SchemeConfig(weight=QuantSpec(granularity="cluster"))
INPUT_ONLY = SchemeConfig(input=QuantSpec(granularity="token", dynamic=True))
UNMATCHED = SchemeConfig(weight=QuantSpec(), overrides=(Override("*.nowhere", {"weight": None}),))


@pytest.mark.parametrize(
    ("make", "message", "arguments"),
    [
        (plain, "scheme: 'nf5' is no shipped scheme; did you mean 'nf4'", ("nf5",)),
        (lambda: plain(48), "group_size: 64 does not divide.*48.*first: use 48", ("nf4",)),
        (integers, r"1\.last\.weight: is torch.int8: only a floating-point", ("w8a8",)),
        (lambda: plain().to("meta"), r"1\.first\.weight: is on the meta device.*prepare_", ("w8a8",)),
        (tied_linears, r"a\.weight: is b\.weight too", ("w8a8",)),
        (quantized, r"already quantized \(1\.first is a PackedLinear\)", ("w8a8",)),
        (lambda: nn.Sequential(nn.ReLU()), "holds no Linear to quantize", ("w8a8",)),
        (lambda: nn.Linear(64, 64), "is itself a Linear", ("w8a8",)),
        (plain, "include: 'frist' matches no Linear; did you mean 'first'", ("w8a8", ["frist"])),
        (plain, "exclude: 'lats' matches no Linear; did you mean 'last'", ("w8a8", [], ["lats"])),
        (plain, "scheme.input.dynamic: false needs calibration", ("w8a8_static",)),
        (plain, "scheme.input.dynamic: false", (STATIC,)),
        (plain, "scheme.key: is no tensor of a Linear", (ATTENTION,)),
        (plain, "cluster", (CLUSTER,)),
        (plain, "scheme.weight: null for 1.first", (INPUT_ONLY,)),
        (plain, "scheme.overrides.0..modules: .*matches no Linear", (UNMATCHED,)),
        (plain, "scheme.weight.format: 'llm_int8'", (SchemeConfig(weight=spec_of("llm_int8")),)),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(make, message, arguments):
    assert_refused(make(), message, *arguments)


def test_a_model_of_another_quantizer_is_refused_by_its_config():
    model = random_tiny("llama")
    model.config.quantization_config = {"quant_method": "other"}
    assert_refused(model, "already quantized, says its config", "w8a8")


def test_a_model_without_packed_linears_has_nothing_to_dequantize():
    with pytest.raises(UserError, match="nothing to dequantize"):
        dequantize_(plain())
    empty = plain().to("meta")
    prepare_(empty, "w8a8")
    with pytest.raises(UserError, match="1.first: its codes are on the meta device"):
        dequantize_(empty)
