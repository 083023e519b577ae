"""Packed models run on kernels by themselves: the decoded model's logits to rounding, said where not, timings kept, memory counted."""

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq.cli.app import main
from ptq.cli.kernels import lines
from ptq.errors import UserError
from ptq.files.kernel_timings import KIND, KeptTimings, timings_key
from ptq.integrations.kernels import kernel_use, use_kernels_
from ptq.integrations.replace import quantize_
from ptq.integrations.transformers import PtqConfig
from quantize.spec.quant_spec import QuantSpec

IDS = torch.arange(1, 25)[None] % 60
CPU = torch.device("cpu")


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=PtqConfig(**options))


BY_ONNXRUNTIME = pytest.mark.skipif(
    find_spec("onnxruntime") is None, reason="in float32 onnxruntime alone has a kernel for it"
)


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a8", "w4a4", pytest.param("w4a16_g32", marks=BY_ONNXRUNTIME), "w8a16", "w8a8_tensor"]
)
@torch.no_grad()
def test_a_model_that_is_loaded_again_multiplies_by_kernels_and_gives_the_decoded_logits(tiny_llama, tmp_path, scheme):
    load(tiny_llama, scheme=scheme).save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found, again = model(IDS).logits, model(IDS).logits
    assert torch.equal(found, again)
    use = kernel_use(model)
    assert "decoded" not in use.linears and not use.reasons
    use_kernels_(model, "simulated")
    expected = model(IDS).logits
    assert kernel_use(model).reasons == {"asked for": 28} and kernel_use(model).held_bytes == 0
    spread = expected.std()
    # One rounding of a sum otherwise turns few codes of later inputs.
    assert float((found - expected).abs().max()) < (0.15 if scheme == "w4a4" else 0.02) * spread
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@torch.no_grad()
def test_generate_says_the_same_with_and_without_kernels_and_counts_what_they_hold(tiny_llama):
    model = load(tiny_llama, scheme="w8a8")
    first = model.generate(IDS, max_new_tokens=8, do_sample=False)
    held = kernel_use(model).held_bytes
    assert 0 <= held <= sum(m.codes.numel() for m in model.modules() if hasattr(m, "codes"))
    use_kernels_(model, "simulated")
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), first)


def test_what_is_decoded_at_each_call_is_said_once_with_the_reason(tiny_llama):
    with pytest.warns(UserWarning, match="28 of 28 packed Linears are decoded at each call") as said:
        model = load(tiny_llama, scheme="nf4")
    assert len([w for w in said if "packed Linears" in str(w.message)]) == 1
    assert "hold_bits is 8" in str(said[0].message)
    wide = load(tiny_llama, scheme="nf4", hold_bits=32)
    with torch.no_grad():
        torch.testing.assert_close(wide(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert kernel_use(wide).linears == {"dequantized": 28}
    assert "hold_bits" not in wide.config.to_json_string()


def test_timings_are_kept_by_machine_versions_and_threads_and_damaged_ones_taken_again(tiny_llama, tmp_path):
    folder = tmp_path / "kept"
    model = load(tiny_llama, scheme="w4a8")
    use_kernels_(model, hold_bits=16, cache=folder)
    with torch.no_grad():
        model(IDS)
    kept = KeptTimings(CPU, folder).recall()
    assert kept and all(set(times) == {"int_mm", "fbgemm", "onednn_int8"} for times in kept.values())
    assert {"torch", "onnxruntime", "processor", "threads", "capability"} <= timings_key(CPU).keys()
    [entry] = (folder / KIND).iterdir()
    file = next(path for path in entry.iterdir() if path.read_text().startswith('{"QuantSpec'))
    assert json.loads(file.read_text()) == kept
    file.write_text("{")
    assert KeptTimings(CPU, folder).recall() == {}
    use_kernels_(model, hold_bits=16, cache=folder)
    with torch.no_grad():
        model(IDS)
    assert KeptTimings(CPU, folder).recall().keys() == kept.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernels": "int_m"}, "kernels: 'int_m' is not valid: expected one of auto, simulated, .*int_mm, .*did you mean 'int_mm'"),
        ({"hold_bits": -1}, "hold_bits: -1 is not valid: expected a number of bits a weight, such as 8"),
        ({"kernels": "int4pack"}, "'int4pack' cannot multiply model.layers.0.self_attn.q_proj: .*up to 4 bits.*: use .*int_mm, .*auto, simulated"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_before_the_work(tiny_llama, options, said):
    with pytest.raises(UserError, match=said):
        load(tiny_llama, scheme="w8a8", **options)


def test_other_modules_run_on_kernels_too():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    quantize_(model, "w8a8", exclude=())
    x = torch.randn(3, 64)
    found = model(x)
    assert kernel_use(model).linears == {"integer": 2}
    use_kernels_(model, "simulated")
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-3)


def test_the_command_shows_kernels_and_what_was_timed(capsys, tmp_path):
    KeptTimings(CPU, tmp_path).keep({f"{QuantSpec()} x None (8, 8) cpu 1 rows": {"slow": 2.0, "quick": 0.5}})
    assert main(["show", "kernels"]) == 0
    shown = capsys.readouterr().out
    for part in ("auto:", "int_mm:", "fbgemm:", "onednn_int8:", "onnxruntime:", "timed here (", "torch "):
        assert part in shown
    assert "  (bits=8) x None (8, 8) cpu 1 rows: quick 0.5 ms, slow 2 ms" in "\n".join(lines(str(tmp_path)))
