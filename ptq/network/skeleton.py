"""A model without its weights, as a network: enough for every check of shapes, and for passes of shapes through it."""

import copy
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ptq.config.schema import ModelConfig
from ptq.errors import UserError
from ptq.files.safetensors_file import read_header
from ptq.files.store import Store
from ptq.models.loading import check
from ptq.models.locations import locate, quiet
from ptq.models.weights import shards_of
from ptq.network.attention import attention_named
from ptq.network.experts.trace import Routing
from ptq.network.network import Block, Network, build_network, replaced_forward, uncollected, weight_of

NAME = "ptq_shapes"
MOST_MODULES = 60_000
"""More than any model that is held block by block has."""
MODULES_A_TENSOR = 100
"""Modules that one stored tensor may stand for: experts that the model holds one by one may be stored in one tensor."""
LEAST_MODULES = 2000
"""So many are built in any case, so that what is missing of the weights can be named."""


class NotTraceable(Exception):
    """The model's forward pass needs values, so that it does not run on the meta device. The text is the reason."""

    @classmethod
    def because(cls, error: Exception) -> "NotTraceable":
        """Returns one whose text is `error` on one line."""
        return cls(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


@uncollected()
def skeleton(model: ModelConfig, store: Store | None = None, weights: bool = True) -> Network:
    """Returns the model on the meta device, as a network.

    Args:
        model: which one.
        store: where what was read out of a GGUF file is kept; None to read it again.
        weights: whether the model's own must be there; without, its config.json is enough.

    Raises:
        UserError: when it is not there, damaged, or no causal language model.
    """
    import transformers
    from transformers.initialization import no_init_weights  # a second, which finished runs do without

    config = check(model, store, weights)
    # Of numbers that nobody will see, drawing them would be most of the work.
    with torch.device("meta"), no_init_weights(), _counted(model, _most_modules(model, weights)):
        try:
            built = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        except ValueError as error:
            raise UserError(
                f"model.path: {model.path} is no causal language model ({str(error).splitlines()[0]})"
            ) from None
        except UserError:
            raise
        except Exception as error:  # a config may make transformers, or code of the model's own, raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(
                f"model.path: {model.path}: no model of its config.json can be built ({reason}): mend the config"
            ) from None
        built.tie_weights()
    return build_network(built)


def _most_modules(model: ModelConfig, weights: bool) -> int:
    """Returns how many modules a model can have whose weights lie in a folder, by their number; else `MOST_MODULES`."""
    location = locate(model)
    if not weights or location.kind != "directory":
        return MOST_MODULES
    stored = sum(len(read_header(shard)) for shard in shards_of(pathlib.Path(location.base)))
    return min(MOST_MODULES, max(LEAST_MODULES, MODULES_A_TENSOR * stored))


@contextmanager
def _counted(model: ModelConfig, most: int) -> Iterator[None]:
    """Inside, a model of more than `most` modules is refused while it is built, instead of for hours."""
    count = 0

    def registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            why = "" if most == MOST_MODULES else ", far more than its weights are for"
            raise UserError(
                f"model.path: the config of {model.path} asks for more than {most} modules{why}: mend its sizes"
            )

    with register_module_module_registration_hook(registered):
        yield


@contextmanager
def without_values(network: Network, seen: set[nn.Module]) -> Iterator[None]:
    """Inside, a network on the meta device can be called: where values would be looked at, its parts do without them.

    Attentions that use transformers' interface multiply tokens with tokens and nothing else, and are added to `seen`. Of a
    mixture the first expert stands for all: it gets as many tokens as all of them are handed.
    """
    import transformers

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        seen.add(module)
        return _attention_of_shapes(module, *args, **kwargs)

    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    with quiet(), attention_named(network, NAME):
        routed = [
            (block.module.get_submodule(mixture.routing.module), _experts_of_shapes(block, mixture.routing))
            for block in network.blocks
            for mixture in block.mixtures
            if mixture.routing is not None
        ]
        with replaced_forward([module for module, _ in routed], lambda i: routed[i][1]):
            yield


def interface_attentions(network: Network) -> dict[int, list[str]]:
    """Returns the full names of the modules that call transformers' attention interface, by block, of a network on the meta device.

    Raises whatever the model's code raises where it does not run without values.
    """
    seen: set[nn.Module] = set()
    with without_values(network, seen):
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        # Without a mask values are looked at: for padding, for sequences packed into one.
        network.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return {
        block.index: [name for name, m in block.module.named_modules(prefix=block.name) if m in seen]
        for block in network.blocks
    }


def _attention_of_shapes(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The two products of an attention and nothing else; (batch, heads, tokens, channels) as in transformers' interface."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    return (query @ key.transpose(2, 3) @ value).transpose(1, 2).contiguous(), None


def _experts_of_shapes(block: Block, routing: Routing) -> Callable[..., torch.Tensor]:
    """The products of a mixture's experts and nothing else, all of them in the first one."""

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update((key, value) for key, value in kwargs.items())
        hidden: torch.Tensor = next(iter(given.values()))
        tokens = given[routing.index].numel()
        first = next(names for names in block.experts.values())
        for name in first:
            linear = block.linears[name]
            linear(hidden.new_empty(tokens, weight_of(linear).shape[1]))
        return torch.empty_like(hidden)

    return forward


def flat_inputs(network: Network) -> frozenset[str]:
    """Returns the Linears that the model hands two dimensions, (tokens, channels), where others get (batch, tokens, channels).

    Calls a copy of the model on the meta device: the network itself may be anywhere.

    Raises:
        NotTraceable: when the forward pass does not run without values.
    """
    from transformers.initialization import no_init_weights

    model = network.model
    try:
        with torch.device("meta"), no_init_weights():
            twin = build_network(type(model)(copy.deepcopy(model.config)).eval())
        found: set[str] = set()
        for name, module in twin.linears.items():
            module.register_forward_pre_hook(lambda _, args, name=name: found.add(name) if args[0].dim() == 2 else None)
        tokens = torch.ones(1, 2, dtype=torch.long, device="meta")
        with without_values(twin, set()), torch.no_grad():
            twin.model(input_ids=tokens, attention_mask=tokens)
    except Exception as error:  # remote code may raise anything
        raise NotTraceable.because(error) from error
    for block in twin.blocks:
        if any(name in found for names in block.experts.values() for name in names):
            found |= {name for names in block.experts.values() for name in names}
    return frozenset(found)
