"""gpt-oss as it is published: experts in MXFP4, read as the numbers that transformers makes of them, and quantized again."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ptq.cli.app import main
from ptq.config.building import recipe_from
from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.models.loading import load
from ptq.models.stored.mxfp4 import SPEC
from ptq.network.network import build_network, weight_of
from ptq.run.experiment import run
from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer
from quantize.codecs.registry import codec_of

PROJECTIONS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny random gpt-oss whose experts lie in codes and scales, and bf16 beside them, as openai/gpt-oss-20b does."""
    config = transformers.AutoConfig.for_model(
        "gpt_oss", vocab_size=BYTE_VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter.dim() == 1))
    folder = tmp_path_factory.mktemp("gpt-oss")
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.rpartition(".")[2] not in PROJECTIONS:
            tensors[name] = tensor
            continue
        blocks, scales = [], []
        for matrix in tensor:
            encoded = codec_of(SPEC).encode(matrix.t().float().contiguous(), SPEC)
            blocks.append(encoded["codes"].view(*encoded["scale"].shape, 16))
            scales.append(encoded["scale"])
        tensors |= {f"{name}_blocks": torch.stack(blocks), f"{name}_scales": torch.stack(scales)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(written))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", ["resident", "offloaded"])
def test_experts_are_the_numbers_that_transformers_dequantizes(published, weights):
    loaded = load(ModelConfig(str(published), dtype="float32"), ExecutionConfig("cpu", weights=weights))
    network, stored = build_network(loaded.model), load_file(published / "model.safetensors")
    loaded.weights.take_apart(network.pieces)
    for block in network.blocks:
        prefix = f"{block.name}.mlp.experts"
        whole = {
            p: convert_moe_packed_tensors(
                stored[f"{prefix}.{p}_blocks"], stored[f"{prefix}.{p}_scales"], dtype=torch.float32
            )
            for p in PROJECTIONS
        }
        with loaded.weights.hold([block.name]):
            for expert in range(4):
                gate, up, down = (
                    weight_of(block.linears[f"{prefix}.{expert}.{p}_proj"]) for p in ("gate", "up", "down")
                )
                assert torch.equal(gate, whole["gate_up_proj"][expert][:, 0::2].t())
                assert torch.equal(up, whole["gate_up_proj"][expert][:, 1::2].t())
                assert torch.equal(down, whole["down_proj"][expert].t())


def recipe(folder, path, **changes):
    base = {
        "name": "gpt-oss", "model": {"path": str(path)}, "calibration": {"samples": 2, "length": 48},
        "evaluation": {"windows": 2, "length": 48}, "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 32}},
        "steps": {"gptq": {}}, "outputs": str(folder / "outputs"), "store": str(folder / "store"),
    }  # fmt: skip
    return recipe_from({**base, **changes})


def test_a_run_dequantizes_and_quantizes_again_resident_and_offloaded_alike(tmp_path, published):
    found = []
    for weights in ("resident", "offloaded"):
        folder = run(recipe(tmp_path / weights, published, execution={"weights": weights}))
        found.append(json.loads((folder / "metrics.json").read_text()))
    one, other = found
    assert one["kl_mean"] == other["kl_mean"] > 0 and one["baseline_perplexity"] == other["baseline_perplexity"]
    assert one["weight_fingerprint"] == other["weight_fingerprint"]


def test_rounding_to_mxfp4_again_changes_no_expert(tmp_path, published):
    scheme = {
        "weight": {"format": "mxfp4", "bits": 4, "granularity": "group", "group_size": 32},
        "exclude": ["*self_attn*"],
    }
    folder = run(recipe(tmp_path, published, scheme=scheme, steps={"rtn": {}}))
    assert json.loads((folder / "metrics.json").read_text())["kl_mean"] == 0


def test_codes_that_are_not_there_or_no_numbers_are_named(tmp_path, published, capsys):
    for change, words in (
        ("gone", "holds no codes and scales of model.layers.1.mlp.experts.down_proj"),
        ("nan", "holds NaN or inf"),
    ):
        model = tmp_path / change
        model.mkdir()
        for file in published.iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        tensors = load_file(model / "model.safetensors")
        if change == "gone":
            del tensors["model.layers.1.mlp.experts.down_proj_scales"]
        else:
            tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] = 255
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        path = tmp_path / f"{change}.yaml"
        path.write_text(
            json.dumps(recipe(tmp_path / change, model, model={"path": str(model), "dtype": "bfloat16"}).as_dict())
        )
        capsys.readouterr()
        assert main(["run", "--config", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: model.path:") and words in error and error.count("\n") == 1


def test_other_quantized_checkpoints_are_still_refused(tmp_path, published):
    (tmp_path / "config.json").write_text((published / "config.json").read_text().replace('"mxfp4"', '"gptq"'))
    (tmp_path / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    with pytest.raises(
        UserError, match="is already quantized: expected the original 16 or 32-bit weights, or experts in MXFP4"
    ):
        load(ModelConfig(str(tmp_path)), ExecutionConfig("cpu"))
