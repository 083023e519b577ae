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
def test_injected_outliers_leave_the_logits_alone_and_stretch_channels_of_every_link(kind, request):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind)).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(32)[None] + 60
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        channels = inject_outliers(model, 60.0, channels=16)
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-3, atol=2e-3)
    assert len(set(channels)) == 16
    names = {
        "tiny_opt": ("self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"),
        "tiny_llama": ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"),
    }[kind]
    root = "model.decoder.layers" if kind == "tiny_opt" else "model.layers"
    for writer in [f"{root}.{block}.{name}" for block in range(4) for name in names]:
        # Columns of a writer may be divided by the factors of the link that it reads: rows are compared by their least.
        now, then = (x.abs().flatten(1) if x.dim() > 1 else x.abs()[:, None] for x in (
            model.get_parameter(f"{writer}.weight"), before[f"{writer}.weight"]))  # fmt: skip
        factor = (now / then).nan_to_num(0).amax(1)
        assert (factor > 53).sum() == 16 and factor.max() < 60.1 and (factor < 1.001).sum() == len(factor) - 16
        if "norm" in writer:
            assert set(factor.topk(16).indices.tolist()) == set(channels)


def test_random_models_are_the_same_for_the_same_seed():
    a, b, c = random_tiny("llama", 1), random_tiny("llama", 1), random_tiny("llama", 2)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bert"):
        train_tiny("bert", tmp_path)
