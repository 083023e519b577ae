"""Embedding and head as packed modules: looked up, multiplied, saved once where they are tied, and back."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.integrations.replace import dequantize_, prepare_, quantize_
from ptq.integrations.transformers import PtqConfig
from ptq.testing import random_tiny
from quantize.codecs.registry import codec_of
from quantize.modules.packed import PackedLinear
from quantize.modules.packed_embedding import PackedEmbedding
from quantize.spec.quant_spec import QuantSpec, spec_of

IDS = torch.arange(24)[None] % 60
SPEC = QuantSpec(bits=4, granularity="group", group_size=4, symmetric=False, scales="float16_min")
SCHEME = SchemeConfig(weight=QuantSpec(bits=8), embedding=SPEC, head=SPEC)
TIED = {"llama": False, "gpt2": True, "gemma3": True}


@pytest.fixture(scope="module", params=list(TIED))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    random_tiny(request.param).save_pretrained(path)
    return path


def loaded(folder, scheme=None):
    given = {} if scheme is None else {"quantization_config": PtqConfig(scheme)}
    return AutoModelForCausalLM.from_pretrained(folder, **given)


def tied(model):
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return all(getattr(head, name) is getattr(embedding, name) for name in embedding.stored_names)


def test_a_model_is_loaded_with_a_packed_embedding_and_head_and_comes_back_with_the_same_logits(folder, tmp_path):
    model, in_place = loaded(folder, SCHEME), loaded(folder)
    # What it is to compute: the plain model with these weights rounded.
    embedding, head = in_place.get_input_embeddings().weight, in_place.get_output_embeddings().weight
    rounded = [codec_of(SPEC).fake_weight(w.detach(), SPEC) for w in (embedding, head)]
    quantize_(in_place, SchemeConfig(weight=QuantSpec(bits=8)))
    with torch.no_grad():
        embedding.copy_(rounded[0])
        head.copy_(rounded[1])
    expected = in_place(IDS).logits
    again = loaded(folder)
    quantize_(again, SCHEME)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) and isinstance(
        model.get_output_embeddings(), PackedLinear
    )
    one = TIED[model.config.model_type.removesuffix("_text")]
    assert tied(model) == tied(again) == one
    for number, source in enumerate((model, again)):
        assert torch.equal(source(IDS).logits, model(IDS).logits)
        place = tmp_path / str(number)
        source.save_pretrained(place)
        with safe_open(place / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert sum(name.endswith("lm_head.codes") for name in names) == (0 if one else 1)
        assert any("emb" in name or "wte" in name for name in names if name.endswith(".codes"))
        back = loaded(place)
        assert torch.equal(back(IDS).logits, model(IDS).logits) and tied(back) == one
        back.save_pretrained(tmp_path / f"{number}-again")
        assert (tmp_path / f"{number}-again/config.json").read_text() == (place / "config.json").read_text()
    specs = json.loads((tmp_path / "0/config.json").read_text())["quantization_config"]["specs"]
    assert specs["embedding"]["bits"] == specs["head"]["bits"] == 4


def test_it_is_dequantized_with_its_weights_tied_as_before_and_saved_as_a_plain_model(folder, tmp_path):
    model = loaded(folder, SCHEME)
    expected = model(IDS).logits
    dequantize_(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert type(model.get_input_embeddings()) is type(loaded(folder).get_input_embeddings())
    one = TIED[model.config.model_type.removesuffix("_text")]
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == one
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != one and not any("codes" in name for name in file.keys())  # noqa: SIM118
    if not any("Conv1D" in type(module).__name__ for module in loaded(folder).modules()):
        assert torch.equal(loaded(tmp_path)(IDS).logits, model(IDS).logits)


def test_moved_to_another_type_a_tied_head_still_shares_the_codes(folder):
    model = loaded(folder, SCHEME)
    before = tied(model)
    assert model.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
    assert tied(model) == before


def test_an_empty_model_is_prepared_and_filled_from_a_state(folder):
    source, target = loaded(folder), loaded(folder)
    quantize_(source, SCHEME)
    prepare_(target.to("meta"), SCHEME)
    assert not target.load_state_dict(source.state_dict(), assign=True).missing_keys
    names = source.get_input_embeddings().stored_names
    assert all(
        torch.equal(target.get_input_embeddings().stored[n], source.get_input_embeddings().stored[n]) for n in names
    )


@pytest.mark.parametrize(
    ("kind", "scheme", "line"),
    [
        ("gpt2", SchemeConfig(weight=SPEC, head=SPEC), "ties the two weights"),
        ("llama", SchemeConfig(weight=QuantSpec(bits=8), embedding=spec_of("q8_0", group_size=64)), r"scheme.embedding: .*row"),
        ("llama", SchemeConfig(weight=QuantSpec(bits=8), head=QuantSpec(granularity="group", group_size=7)), "scheme.head: group"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(kind, scheme, line):
    model = random_tiny(kind)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError, match=line):
        quantize_(model, scheme)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(UserError, match="has no such Embedding"):
        quantize_(nn.Sequential(nn.Linear(8, 8)), SchemeConfig(weight=QuantSpec(), embedding=QuantSpec()))
