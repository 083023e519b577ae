"""llama2.c and KuiperLLama files: bytes as described, logits reproduced, other models and schemes refused by field name."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
import transformers

from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from ptq.export import to_kuiper, to_llama2c
from ptq.inspect.q8_readers import open_kuiper, open_llama2c
from ptq.inspect.q8_reference import Reference
from ptq.network.network import build_network
from quantize.codecs.registry import codec_of
from quantize.spec.quant_spec import QuantSpec

GROUPS = QuantSpec(granularity="group", group_size=16)
INPUTS = dataclasses.replace(GROUPS, dynamic=True)
Q8, Q8_WEIGHTS = SchemeConfig(weight=GROUPS, input=INPUTS), SchemeConfig(weight=GROUPS)
NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]  # fmt: skip


def llama2c(tokenizer=False):
    return to_llama2c.Exporter(to_llama2c.Options(tokenizer))


def kuiper(build="llama2"):
    return to_kuiper.Exporter(to_kuiper.Options(build))


def q8(array):
    """Codes and scales of flat groups of 16, in numpy."""
    groups = array.astype(np.float32).reshape(-1, 16)
    scale = np.abs(groups).max(1) / np.float32(127)
    return np.rint(groups / scale[:, None]).astype("i1").tobytes() + scale.astype("<f4").tobytes()


def interleaved(array, heads):
    """Rows so ordered that pair i of a head, (i, i + half), becomes (2i, 2i + 1); written as a loop."""
    size = len(array) // heads
    order = [h * size + p + half for h in range(heads) for p in range(size // 2) for half in (0, size // 2)]
    return array[order]


def floats(*arrays):
    return b"".join(a.astype("<f4").tobytes() for a in arrays)


def pieces(model):
    """The weights of a random LLaMA as numpy: norms, matrices in the order of the formats, embedding, head."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    layers = range(model.config.num_hidden_layers)
    norms = [
        state[f"model.layers.{i}.{n}.weight"] for n in ("input_layernorm", "post_attention_layernorm") for i in layers
    ]
    matrices = [(n, state[f"model.layers.{i}.{n}.weight"]) for n in NAMES for i in layers]
    return [*norms, state["model.norm.weight"]], matrices, state["model.embed_tokens.weight"], state["lm_head.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files_have_the_bytes_of_the_description(tmp_path, llama_model, quantized, tied):
    model = llama_model(tied)
    norms, matrices, embedding, head = pieces(model)
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    expected = struct.pack("<Ii7iBi", 0x616B3432, 2, 32, 48, 2, 4, 2, 60, 64, tied, 16).ljust(256, b"\0") + floats(
        *norms
    )
    expected += q8(embedding)
    expected += b"".join(q8(interleaved(w, heads[n]) if n in heads else w) for n, w in matrices)
    expected += b"" if tied else q8(head)
    done = llama2c().write(quantized(model, Q8), tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == expected
    values = sum(w.size for _, w in matrices) + embedding.size * (1 if tied else 2)
    assert done.bytes == len(expected) == 256 + 4 * 32 * (2 * 2 + 1) + values + 4 * values // 16


@pytest.mark.parametrize(("build", "base"), [("llama2", 1e4), ("llama3", 5e5)])
def test_kuiper_files_have_the_bytes_of_the_description_and_always_their_own_head(
    tmp_path, llama_model, quantized, build, base
):
    model = llama_model(rope_parameters={"rope_type": "default", "rope_theta": base})
    norms, matrices, embedding, _ = pieces(model)
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2} if build == "llama2" else {}
    expected = struct.pack("<8i", 32, 48, 2, 4, 2, -60, 64, 16)
    expected += b"".join(q8(interleaved(w, heads[n]) if n in heads else w) for n, w in matrices)
    expected += q8(embedding) + floats(embedding, *norms)
    kuiper(build).write(quantized(model, Q8_WEIGHTS), tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == expected


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_of_the_scheme_lie_in_the_files_as_the_run_has_rounded_them(
    tmp_path, llama_model, quantized, tied
):
    path, model = tmp_path / "model.bin", llama_model(tied)
    norms, _, embedding, head = pieces(model)
    llama2c().write(quantized(model, Q8), path)
    alone = path.read_bytes()
    both = dataclasses.replace(Q8, embedding=GROUPS, head=GROUPS)
    assert not [n for n in llama2c().write(quantized(llama_model(tied), both), path).notes if "Q8_0" in n]
    assert path.read_bytes() == alone
    spec = {"head": GROUPS, **({"embedding": GROUPS} if tied else {})}
    assert kuiper().write(quantized(llama_model(tied), dataclasses.replace(Q8_WEIGHTS, **spec)), path).notes == ()
    values = codec_of(GROUPS).fake_weight(torch.from_numpy(embedding), GROUPS).numpy() if tied else embedding
    rest = floats(values, *norms)
    assert path.read_bytes()[: -len(rest)].endswith(q8(head))
    # A code of 0 has no sign: -0 and 0 are equal.
    assert np.array_equal(np.frombuffer(path.read_bytes()[-len(rest) :], "<f4"), np.frombuffer(rest, "<f4"))


@pytest.mark.parametrize(
    ("exporter", "scheme", "said"),
    [
        (llama2c(), dataclasses.replace(Q8, head=dataclasses.replace(GROUPS, bits=4)), "scheme.head.bits: 4"),
        (llama2c(), dataclasses.replace(Q8, embedding=dataclasses.replace(GROUPS, group_size=8)), "scheme.embedding.group_size: 8"),
        (kuiper(), dataclasses.replace(Q8_WEIGHTS, embedding=GROUPS), "scheme.embedding: quantized, but kuiper has no place"),
    ],
)  # fmt: skip
def test_other_formats_of_embedding_and_head_are_refused(llama_model, exporter, scheme, said):
    with pytest.raises(UserError) as error:
        exporter.check(scheme, build_network(llama_model(tied=False)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("exporter", "scheme", "opened", "int8"),
    [(llama2c(), Q8, open_llama2c, True), (kuiper(), Q8_WEIGHTS, open_kuiper, False)],
)
def test_the_reference_pass_over_a_file_gives_the_simulated_logits(
    tmp_path, llama_model, quantized, exporter, scheme, opened, int8
):
    model = llama_model(tied=False)
    ids = torch.arange(40) * 7 % 60
    before = model(ids[None]).logits[0]
    source = quantized(model, scheme)
    exporter.write(source, tmp_path / "model.bin")
    file = opened(tmp_path / "model.bin")
    # Head and embedding are quantized in the file: so they are here, through numbers of the file itself.
    model.lm_head.weight.copy_(file.read("output"))
    model.model.embed_tokens.weight.copy_(file.read("tok_embeddings"))
    simulated = model(ids[None]).logits[0]
    reference = Reference(file, rope_base=1e4, eps=1e-5, interleaved=True, int8_inputs=int8).logits(ids)
    spread = before.std()
    # llama2.c rounds the head's input too, which the simulation leaves alone.
    assert (reference - simulated).abs().max() < (0.05 if int8 else 1e-4) * spread
    assert (reference - before).abs().mean() < 0.05 * spread


def test_wrongly_ordered_rows_would_be_noticed(tmp_path, llama_model, quantized):
    source = quantized(llama_model(), Q8)
    llama2c().write(source, tmp_path / "model.bin")
    file = open_llama2c(tmp_path / "model.bin")
    ids = torch.arange(40) * 7 % 60
    right = Reference(file, 1e4, 1e-5, True, True).logits(ids)
    wrong = Reference(file, 1e4, 1e-5, False, True).logits(ids)
    assert (right - wrong).abs().max() > 0.2 * right.std()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_a_model_that_the_runtime_would_compute_wrongly_is_refused_by_field(llama_model, changes, field):
    network = build_network(llama_model(**changes))
    for exporter, scheme in ((llama2c(), Q8), (kuiper(), Q8_WEIGHTS)):
        with pytest.raises(UserError, match=field) as error:
            exporter.check(scheme, network)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["opt", "qwen2", "gemma3", "mixtral", "gpt2"])
def test_other_architectures_are_refused_by_name(architecture):
    from ptq.testing import random_tiny

    with pytest.raises(UserError, match="model_type"):
        llama2c().check(Q8, build_network(random_tiny(architecture)))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (SchemeConfig(weight=dataclasses.replace(GROUPS, bits=4), input=INPUTS), "scheme.weight.bits: 4"),
        (SchemeConfig(weight=QuantSpec(), input=INPUTS), "scheme.weight.granularity: 'channel'"),
        (SchemeConfig(weight=dataclasses.replace(GROUPS, symmetric=False), input=INPUTS), "scheme.weight.symmetric"),
        (SchemeConfig(weight=GROUPS), "scheme.input: null"),
        (SchemeConfig(weight=GROUPS, input=dataclasses.replace(INPUTS, group_size=8)), "scheme.input.group_size: 8"),
        (SchemeConfig(), "scheme.weight: null"),
        (dataclasses.replace(Q8, key=INPUTS), "scheme.key"),
        (dataclasses.replace(Q8, exclude=("*.down_proj",)), "down_proj"),
        (dataclasses.replace(Q8, overrides=(Override("*.up_proj", {"weight": QuantSpec()}),)), "up_proj"),
    ],
)
def test_a_scheme_that_the_format_cannot_hold_is_refused_with_the_nearest_one(llama_model, scheme, words):
    with pytest.raises(UserError) as error:
        llama2c().check(scheme, build_network(llama_model()))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "group_size: 16" in str(error.value) or "scheme.key" in str(error.value)


def test_the_nearest_group_size_divides_both_widths(llama_model):
    with pytest.raises(UserError, match="group_size: 8}"):
        llama2c().check(
            SchemeConfig(weight=QuantSpec(), input=INPUTS), build_network(llama_model(intermediate_size=56))
        )
    size = dataclasses.replace(GROUPS, group_size=32)
    with pytest.raises(UserError, match="scheme.weight.group_size: 32"):
        llama2c().check(SchemeConfig(weight=size, input=INPUTS), build_network(llama_model()))


def test_kuiper_refuses_quantized_inputs_and_unknown_builds(llama_model):
    with pytest.raises(UserError, match="scheme.input: quantized .* input null"):
        kuiper().check(Q8, build_network(llama_model()))
    with pytest.raises(UserError, match="did you mean 'llama3'"):
        kuiper("lama3")


def test_a_check_needs_no_weights(llama_model):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama_model().config)
    llama2c().check(Q8, build_network(model))
    kuiper().check(Q8_WEIGHTS, build_network(model))


def test_the_tokenizer_file_gives_back_the_text_of_every_token(tmp_path, llama_model, quantized):
    from ptq.testing import BOS, byte_tokenizer

    tokenizer = byte_tokenizer()
    source = quantized(llama_model(vocab_size=260), Q8, tokenizer)
    done = llama2c(tokenizer=True).write(source, tmp_path / "model.bin")
    data = (tmp_path / "tokenizer.bin").read_bytes()
    longest, position, tokens = struct.unpack_from("<i", data)[0], 4, []
    while position < len(data):
        _, length = struct.unpack_from("<fi", data, position)
        tokens.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    assert len(tokens) == 260 and longest == max(map(len, tokens)) == 4 and tokens[BOS] == b"<s>"
    text = "naïve – ∑\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(tokens[i] for i in ids).decode() == text
    assert any("begin 1" in note for note in done.notes)


def test_an_interrupted_export_leaves_the_old_file_whole(tmp_path, llama_model, quantized, monkeypatch):
    source = quantized(llama_model(), Q8)
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(source, "linear", lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llama2c().write(source, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
