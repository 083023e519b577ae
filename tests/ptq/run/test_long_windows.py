"""Long windows: neither a mask of all pairs of tokens nor the logits of a window is ever formed, in calibration and evaluation."""

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptq.config.building import recipe_from
from ptq.run.experiment import run
from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer

LENGTH = 1536
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Greatest(TorchDispatchMode):
    """Notes the shape of the greatest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.bytes, self.shape, self.by = 0, (), ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # A view of fewer numbers, such as a broadcast, holds what its storage does.
            # Ids of the whole text are integers, and passed over; masks and logits are not.
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.dtype in (*FLOATS, torch.bool):
                held = leaf.untyped_storage().nbytes()
                if held > self.bytes:
                    self.bytes, self.shape, self.by = held, tuple(leaf.shape), str(func)
        return out


def saved(folder, kind, **options):
    sizes = {
        "vocab_size": BYTE_VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": LENGTH, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **sizes, **options)
        )
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "options", "steps"), [
    ("llama", {}, {"smooth": {}, "gptq": {"target": "original"}}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, {"gptq": {}}),
])  # fmt: skip
@pytest.mark.parametrize("execution", [{}, {"weights": "offloaded", "hidden_states": "disk"}])
def test_no_tensor_is_as_large_as_all_pairs_of_tokens_or_the_logits_of_a_window(
    tmp_path, kind, options, steps, execution
):
    model = saved(tmp_path / "model", kind, **options)
    recipe = recipe_from(
        {
            "name": "long", "model": {"path": str(model)}, "calibration": {"samples": 2, "length": LENGTH, "batch_size": 1},
            "evaluation": {"windows": 1, "length": LENGTH, "chunk": 64}, "scheme": {"weight": {"bits": 4}}, "steps": steps,
            "execution": execution, "outputs": str(tmp_path / "outputs"), "store": str(tmp_path / "store"),
        }
    )  # fmt: skip
    with Greatest() as greatest:
        run(recipe)
    # The hidden states of both samples at a Linear's width are the greatest thing that has to be.
    assert greatest.bytes <= 4 * 2 * LENGTH * 96, (greatest.shape, greatest.by)
    assert greatest.bytes < min(4 * LENGTH * BYTE_VOCABULARY, LENGTH**2), "the logits of a window, a mask of all pairs"
