"""The tiny models: trained enough to be worth breaking, and outliers that change nothing but the difficulty."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptq.testing import byte_tokenizer, inject_outliers, random_tiny, train_tiny


def test_the_byte_tokenizer_turns_text_into_bytes_and_back(tiny_opt):
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tiny_opt)):
        ids = tokenizer("Größe, x = 1\n", add_special_tokens=False).input_ids
        assert len(ids) == len("Größe, x = 1\n".encode()) and tokenizer.decode(ids) == "Größe, x = 1\n"


@pytest.mark.parametrize("kind", ["tiny_opt", "tiny_llama"])
def test_a_trained_model_knows_english_far_better_than_chance(kind, request):
    folder = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(
        "The for statement is used to iterate over the elements of a sequence", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.exp() < 12


@pytest.mark.parametrize("kind", ["tiny_opt", "tiny_llama"])
def test_injected_outliers_leave_the_logits_alone_and_stretch_the_channels(kind, request):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind)).eval()
    ids = torch.arange(32)[None] + 60
    with torch.no_grad():
        before = model(input_ids=ids).logits
        channels = inject_outliers(model, 60.0, channels=4)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    block = (model.model.decoder if kind == "tiny_opt" else model.model).layers[1]
    norm = block.final_layer_norm if kind == "tiny_opt" else block.input_layernorm
    others = [i for i in range(128) if i not in channels]
    assert len(channels) == 4 and norm.weight[channels].abs().min() > 5 * norm.weight[others].abs().median()


def test_random_models_are_the_same_for_the_same_seed():
    a, b, c = random_tiny("llama", 1), random_tiny("llama", 1), random_tiny("llama", 2)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bert"):
        train_tiny("bert", tmp_path)
