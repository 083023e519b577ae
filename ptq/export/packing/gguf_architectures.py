"""Which models llama.cpp computes from a GGUF file, and what it calls their tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf

from ptq.network.network import Network


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes one: its number in `gguf`, whether q and k rows are in the order of interleaved rotary pairs,
    and what its norms add to their stored gain (Gemma's are stored with the 1 that transformers adds when it computes).
    Of a mixture `fixed` has what a config must say, for llama.cpp computes that and has no field for it, and `alike` fields that must
    be equal.
    """

    number: gguf.MODEL_ARCH
    interleaved: bool = False
    norm_offset: float = 0.0
    mixture: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()
    alike: tuple[tuple[str, str], ...] = ()


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0),
    "mixtral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True, mixture=True),
    "qwen2_moe": Architecture(
        gguf.MODEL_ARCH.QWEN2MOE, mixture=True,
        fixed=(("norm_topk_prob", False), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "qwen3_moe": Architecture(
        gguf.MODEL_ARCH.QWEN3MOE, mixture=True,
        fixed=(("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "olmoe": Architecture(gguf.MODEL_ARCH.OLMOE, mixture=True, fixed=(("norm_topk_prob", False), ("clip_qkv", None)), alike=(("num_key_value_heads", "num_attention_heads"),)),
}  # fmt: skip


def stacked_experts(network: Network) -> dict[str, str]:
    """Returns, by the full name of an expert's Linear, that of the tensor which holds all experts' (no number in it)."""
    return {
        name: f"{expert.rpartition('.')[0]}{name.removeprefix(expert)}"
        for block in network.blocks
        for expert, names in block.experts.items()
        for name in names
    }


def names_of(network: Network) -> Callable[[str], str | None]:
    """Returns the function from transformers' name of a parameter to GGUF's, None where there is none; experts have one together."""
    stacked = stacked_experts(network)
    architecture = ARCHITECTURES[network.model.config.model_type]
    table = gguf.get_tensor_name_map(architecture.number, len(network.blocks))

    def name_of(name: str) -> str | None:
        owner, _, last = name.rpartition(".")
        name = f"{stacked[owner]}.{last}" if owner in stacked else name
        return table.get_name(name, try_suffixes=(".weight", ".bias"))

    return name_of
