"""Corrections of low rank as a LoRA adapter (Hu et al. 2022), as PEFT loads it: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA computes W x + (alpha / r) B A x. With B = L, A = R and alpha = r this is (W + L R) x: an adapter that nobody has trained.
"""

import importlib.util
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ptq.config.schema import SchemeConfig
from ptq.errors import UserError
from ptq.export.base import specs_by_linear
from ptq.export.quantized_tensors import QuantizedTensors
from ptq.files.atomic import write_text
from ptq.files.safetensors_file import write_as_they_come
from ptq.network.network import Network

FOLDER = "adapter"
"""Of the adapter, inside the model's: transformers loads an adapter that lies beside config.json in place of the model."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""


def check_adapter(scheme: SchemeConfig, network: Network) -> None:
    """Raises `UserError` where PEFT could not add corrections to what the scheme quantizes, or is not there to describe them.

    It adds to what a Linear gives what it computes of the Linear's input before that is rounded; and it finds Linears by
    name in the model that transformers builds, where the experts of a mixture are one tensor.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "export.format: an adapter for PEFT needs a package that is not there (peft): pip install 'ptq-framework[export]'"
        )
    specs = specs_by_linear(scheme, network)
    rounded = next((name for name, s in specs.items() if s.weight is not None and s.input is not None), None)
    if rounded is not None:
        raise UserError(
            f"scheme.input: quantized for {rounded}, and an adapter for PEFT multiplies what comes before the rounding: "
            "use scheme.input=null, or export=null"
        )
    fused = next(
        (name for name, s in specs.items() if s.weight is not None and f"{name}.weight" in network.pieces), None
    )
    if fused is not None:
        raise UserError(
            f"export: {fused} is an expert's, which transformers holds in one tensor with the others, and an adapter for PEFT "
            "adds to Linears: exclude the experts, or use export=null"
        )


def write_adapter(folder: pathlib.Path, source: QuantizedTensors) -> tuple[str, ...]:
    """Writes `FOLDER` inside `folder` where the model has corrections; one Linear's are in memory at a time.

    Returns:
        A sentence on how it is loaded; nothing where no weight is corrected, and nothing is written.
    """
    ranks: dict[str, int] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in source.network.linears:
            found = source.correction(name)
            if found is not None:
                ranks[name] = found.right.shape[0]
                yield f"{PREFIX}{name}.lora_A.weight", found.right
                yield f"{PREFIX}{name}.lora_B.weight", found.left

    if all(source.correction(name) is None for name in source.network.linears):
        return ()
    check_adapter(source.scheme, source.network)
    place = folder / FOLDER
    place.mkdir()
    write_as_they_come(place / WEIGHTS, tensors(), 2 * len(source.network.linears), {"format": "pt"})
    write_text(place / CONFIG, json.dumps(_config(ranks), indent=2) + "\n")
    low, high = min(ranks.values()), max(ranks.values())
    return (
        f"corrections of {len(ranks)} weights, rank {low if low == high else f'{low} to {high}'}, are an adapter: load the folder, "
        f"then peft.PeftModel.from_pretrained(model, folder + '/{FOLDER}'); without it the model is the quantized one alone",
    )


def _config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Returns PEFT's own description of LoRA factors of these ranks by full name of a Linear, each scaled by 1."""
    from peft import LoraConfig, TaskType

    rank = max(ranks.values())
    # Patterns are regular expressions for the end of a name.
    others = {name.replace(".", r"\."): found for name, found in ranks.items() if found != rank}
    found = LoraConfig(
        task_type=TaskType.CAUSAL_LM, inference_mode=True, r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none",
        target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others),
    )  # fmt: skip
    # A set has another order in every process.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.to_dict().items()}
