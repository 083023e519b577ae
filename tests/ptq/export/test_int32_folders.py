"""GPTQ and AWQ checkpoints: unpacked by the formats' definitions, written out as loops, they are the simulated weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.export import to_awq, to_gptq
from ptq.export.packing.int32_words import words
from ptq.network.network import build_network
from ptq.testing import random_tiny
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec

GROUPS = QuantSpec(4, granularity="group", group_size=16)
SCHEMES = {
    "groups": SchemeConfig(weight=GROUPS),
    "zero points": SchemeConfig(weight=dataclasses.replace(GROUPS, symmetric=False)),
    "one left alone": SchemeConfig(weight=GROUPS, exclude=("*.0.*o_proj",)),
}
GPTQ_ONLY = {
    "8 bits": SchemeConfig(weight=dataclasses.replace(GROUPS, bits=8)),
    "2 bits": SchemeConfig(weight=dataclasses.replace(GROUPS, bits=2, symmetric=False)),
    "channel": SchemeConfig(weight=QuantSpec(4)),
}


def write(module, model, scheme, path, quantized):
    exporter = module.Exporter(module.Options())
    scheme = exporter.adapt(scheme)
    source = quantized(model, scheme)
    exporter.write(source, path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    return source, load_file(path / "model.safetensors"), config


def bits_of(word, place, bits):
    return (int(word) & 0xFFFFFFFF) >> (bits * place) & (2**bits - 1)


def gptq_weight(tensors, name, config):
    bits, lanes = config["bits"], 32 // config["bits"]
    q, z, s, g = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    weight = np.zeros((q.shape[0] * lanes, q.shape[1]), np.float32)
    plus = 1 if config["checkpoint_format"] == "gptq" else 0
    for i in range(weight.shape[0]):
        for o in range(weight.shape[1]):
            zero = bits_of(z[g[i], o // lanes], o % lanes, bits) + plus
            weight[i, o] = (bits_of(q[i // lanes, o], i % lanes, bits) - zero) * np.float32(s[g[i], o])
    return weight.T


def awq_weight(tensors, name, config):
    places = [0, 4, 1, 5, 2, 6, 3, 7]  # where the code of each output lies in its word
    q, z, s = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    weight = np.zeros((q.shape[0], q.shape[1] * 8), np.float32)
    for i in range(weight.shape[0]):
        group = i // config["group_size"]
        for o in range(weight.shape[1]):
            code, zero = (bits_of(row[o // 8], places[o % 8], 4) for row in (q[i], z[group]))
            weight[i, o] = (code - zero) * np.float32(s[group, o])
    return weight.T


@pytest.mark.parametrize(
    ("module", "read", "scheme"),
    [(to_gptq, gptq_weight, s) for s in (SCHEMES | GPTQ_ONLY).values()] + [(to_awq, awq_weight, s) for s in SCHEMES.values()],
    ids=[f"gptq {name}" for name in SCHEMES | GPTQ_ONLY] + [f"awq {name}" for name in SCHEMES],
)  # fmt: skip
def test_what_is_unpacked_by_the_formats_definition_is_the_simulated_weight(
    tmp_path, llama_model, quantized, module, read, scheme
):
    source, tensors, config = write(module, llama_model(num_hidden_layers=1), scheme, tmp_path / "out", quantized)
    for name in source.network.linears:
        found = source.linear(name)
        weight = read(tensors, name, config) if found.spec is not None else tensors[f"{name}.weight"].astype(np.float32)
        assert np.array_equal(weight, found.dense().numpy()), name
    assert config["quant_method"] == module.NAME and config["bits"] == scheme.weight.bits
    left = str(config.get("dynamic") or config.get("modules_to_not_convert"))
    assert ("o_proj" in left) == bool(scheme.exclude)


def test_words_hold_every_code():
    codes = torch.randint(0, 16, (16, 24))
    for dim in (0, 1):
        packed = words(codes, 4, dim)
        lanes = torch.stack([(packed.long() & 0xFFFFFFFF) >> (4 * k) & 15 for k in range(8)], dim + 1)
        assert torch.equal(lanes.flatten(dim, dim + 1), codes)
    with pytest.raises(ValueError, match="bits: 3"):
        words(codes, 3, 0)
    with pytest.raises(ValueError, match="fill no whole words of 8"):
        words(codes[:15], 4, 0)


@pytest.mark.parametrize("module", [to_gptq, to_awq])
@pytest.mark.parametrize(
    ("scheme", "words_"),
    [
        (SchemeConfig(weight=dataclasses.replace(GROUPS, bits=3)), "scheme.weight.bits: 3"),
        (SchemeConfig(weight=QuantSpec(4, granularity="tensor")), "scheme.weight.granularity: 'tensor'"),
        (SchemeConfig(weight=GROUPS, input=QuantSpec(granularity="token", dynamic=True)), "holds weights only"),
        (SchemeConfig(weight=GROUPS, overrides=(Override("*.v_proj", {"weight": dataclasses.replace(GROUPS, group_size=32)}),)), "has one for all"),
        (SchemeConfig(), "nothing is quantized"),
    ],
)  # fmt: skip
def test_what_the_formats_cannot_hold_is_refused_with_what_they_can(llama_model, module, scheme, words_):
    with pytest.raises(UserError) as error:
        module.Exporter(module.Options()).check(scheme, build_network(llama_model()))
    assert words_ in str(error.value) and "use scheme=w4a16_g64" in str(error.value)


def test_modules_that_are_no_plain_linears_are_refused():
    with pytest.raises(UserError, match="is a Conv1D"):
        to_gptq.Exporter(to_gptq.Options()).check(SCHEMES["groups"], build_network(random_tiny("gpt2")))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_holds_a_head_of_its_own_as_the_run_has_rounded_it(tmp_path, llama_model, quantized, symmetric):
    spec = dataclasses.replace(GROUPS, symmetric=symmetric)
    model = llama_model(tied=False, vocab_size=64, num_hidden_layers=1)
    head = model.lm_head.weight.detach().clone()
    source, tensors, config = write(to_gptq, model, SchemeConfig(weight=spec, head=spec), tmp_path / "out", quantized)
    stored = source.scheme.head
    assert config["lm_head"] and stored.scales == "float16" and "lm_head.weight" not in tensors
    expected = codec_of(stored).fake_weight(head, stored).numpy()
    np.testing.assert_allclose(gptq_weight(tensors, "lm_head", config), expected, atol=1e-6)
    assert np.array_equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight.numpy())


@pytest.mark.parametrize(
    ("module", "scheme", "said"),
    [
        (to_awq, SchemeConfig(weight=GROUPS, head=GROUPS), "scheme.head: quantized, but awq has no place"),
        (to_gptq, SchemeConfig(weight=GROUPS, embedding=GROUPS), "scheme.embedding: quantized, but gptq has no place"),
        (to_gptq, SchemeConfig(weight=GROUPS, head=dataclasses.replace(GROUPS, bits=8)), "scheme.head: another format than scheme.weight"),
        (to_gptq, SchemeConfig(weight=GROUPS, head=dataclasses.replace(GROUPS, bits=3)), "scheme.head.bits: 3"),
        (to_gptq, SchemeConfig(weight=GROUPS, head=GROUPS), "scheme.head: lm_head is 60 x 32, and gptq packs 8 codes a word: use null"),
    ],
)  # fmt: skip
def test_embedding_and_head_that_the_formats_cannot_hold_are_refused(llama_model, module, scheme, said):
    with pytest.raises(UserError) as error:
        module.Exporter(module.Options()).check(scheme, build_network(llama_model(tied=False)))
    assert said in str(error.value)
