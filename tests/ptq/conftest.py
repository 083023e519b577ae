"""Models in the forms that exporters express."""

import pathlib

import pytest
import torch
import transformers

from ptq.config.scheme import linear_specs
from ptq.export.quantized_tensors import ResidentSource
from ptq.network.network import build_network, replace_module
from quantize.modules.simulated import InputQuantizer, QuantLinear


def _quantized(model, scheme, tokenizer=None, ranges=None):
    """A source of `model` quantized by rounding to nearest, without a run around it; `ranges` of inputs by Linear."""
    network = build_network(model)
    for name, module in network.linears.items():
        specs = linear_specs(scheme, name)
        if specs.any:
            inputs = None if specs.input is None else InputQuantizer(specs.input, (ranges or {}).get(name))
            replace_module(model, name, QuantLinear(module.weight, module.bias, specs.weight, inputs))
    return ResidentSource(network, tokenizer, scheme)


def _tiny_llama_model(tied=True, seed=0, **changes):
    """A random LLaMA with grouped queries whose fields llama2.c hard-codes."""
    options = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        **changes,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def tiny_llama_eps(tiny_llama, tmp_path_factory) -> pathlib.Path:
    """The trained LLaMA with the eps that llama2.c computes with (1e-5 for 1e-6, which changes next to nothing)."""
    folder = tmp_path_factory.mktemp("tiny-llama-eps")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized():
    """The function that quantizes a model by rounding to nearest and gives it as a source."""
    return _quantized


@pytest.fixture(scope="session")
def llama_model():
    """The function that makes a random LLaMA which llama2.c expresses."""
    return _tiny_llama_model
