"""A model without its weights, as a network: enough for every check of shapes."""

import torch
from transformers import AutoModelForCausalLM

from ptq.config.schema import ModelConfig
from ptq.errors import UserError
from ptq.files.store import Store
from ptq.models.loading import check
from ptq.network.network import Network, build_network


def skeleton(model: ModelConfig, store: Store | None = None, weights: bool = True) -> Network:
    """Returns the model on the meta device, as a network.

    Args:
        model: which one.
        store: where what was read out of a GGUF file is kept; None to read it again.
        weights: whether the model's own must be there; without, its config.json is enough.

    Raises:
        UserError: when it is not there, damaged, or no causal language model.
    """
    config = check(model, store, weights)
    with torch.device("meta"):
        try:
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        except ValueError as error:
            raise UserError(
                f"model.path: {model.path} is no causal language model ({str(error).splitlines()[0]})"
            ) from None
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(
                f"model.path: {model.path}: no model of its config.json can be built ({reason}): mend the config"
            ) from None
        built.tie_weights()
    return build_network(built)
