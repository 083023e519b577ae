"""A finished block as a file: what its quantized modules hold, and how they are built again."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq.export.quantized_tensors import HELD, OWN
from ptq.files.bounded import parse_json
from ptq.network.attention import CHILD, PREFIX, AttentionQuantizers, CacheFormats, Prefix, attach_quantizers
from ptq.network.network import Block, Network, replace_module
from quantize.modules.cache import CacheFormat
from quantize.modules.hadamard import OnlineHadamard
from quantize.modules.online import INPUT, OUTPUT, OnlineShared, attach_input, attach_output
from quantize.modules.online_maps import OnlineBlocks, OnlineKronecker
from quantize.modules.reordered import Reordered
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import QuantSpec


class Unbuildable(ValueError):
    """A module that a step has put into the block, and that nobody knows how to build again."""


def tensors_of_block(block: Block) -> dict[str, torch.Tensor]:
    """Returns all that the block holds, by full name; tensors that modules share are there once for each."""
    prefix, state = f"{block.name}.", block.module.state_dict()
    seen: set[int] = set()
    tensors = {}
    for key, value in state.items():
        own = value.numel() == 0 or value.data_ptr() not in seen
        seen.add(value.data_ptr())
        tensors[prefix + key] = value.contiguous() if own else value.clone().contiguous()
    return tensors


def description_of(block: Block) -> dict[str, Any]:
    """Returns what `rebuild` has to know beyond the tensors, as JSON holds it."""
    linears: dict[str, Any] = {}
    quantizers: dict[int, str] = {}
    found: dict[str, Any] = {
        "linears": linears,
        "attentions": {},
        "reordered": [],
        "prefixes": [],
        "online": {},
        "norms": {},
        "classes": {},
    }
    for name, module in block.module.named_modules(prefix=block.name):
        if isinstance(module, QuantLinear):
            dtype, shape = str(module.weight.dtype).removeprefix("torch."), list(module.weight.shape)
            linears[name] = {"spec": _spec(module.weight_spec), "dtype": dtype, "shape": shape}
            if module.inputs is not None:
                first = quantizers.setdefault(id(module.inputs), name)
                linears[name]["inputs"] = _quantizer(module.inputs) | {"shared_with": first}
        elif isinstance(module, AttentionQuantizers):
            known = {tensor: _quantizer(q) for tensor, q in module.quantizers.items() if isinstance(q, InputQuantizer)}
            transforms = {tensor: _online(inner) for tensor, inner in module.transforms.items()}
            cache = None if module.cache is None else dataclasses.asdict(module.cache)
            held = {"quantizers": known, "transforms": transforms, "cache": cache}
            found["attentions"][name.removesuffix(f".{CHILD}")] = held
        elif isinstance(module, Prefix):
            found["prefixes"].append(name)
        elif isinstance(module, Reordered):
            found["reordered"].append(name)
        elif type(module) is nn.RMSNorm and not module.elementwise_affine:
            found["norms"][name] = {"width": module.normalized_shape[0], "eps": module.eps}
        found["classes"][name] = _class(module)
        for place in (INPUT, OUTPUT):
            if place in module._modules:
                found["online"].setdefault(name, {})[place] = _online(module.get_submodule(place))
    return found


def write_block(block: Block, path: pathlib.Path, figures: Mapping[str, Any]) -> None:
    """Writes the block as one safetensors file, with its description and the caller's `figures` in the metadata."""
    metadata = {
        "kind": "finished block",
        "description": json.dumps(description_of(block)),
        "figures": json.dumps(figures),
    }
    save_file(tensors_of_block(block), path, metadata=metadata)


def read_figures(path: pathlib.Path) -> dict[str, Any]:
    """Returns the `figures` that `write_block` was given."""
    with safe_open(path, framework="pt") as file:
        figures: dict[str, Any] = parse_json(file.metadata()["figures"])
    return figures


def foreign_in(path: pathlib.Path, model: nn.Module) -> tuple[str, str] | None:
    """Returns the class and the full name of a module that a step has put into a finished block and no export has a place for, or None.

    By the block's description: what acts online may hold no tensor that an export would miss.

    Args:
        path: the block's file.
        model: as its architecture has it.

    Raises:
        ValueError: for a file that `write_block` has not written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description: dict[str, Any] = parse_json((file.metadata() or {})["description"])
        classes: dict[str, str] = description["classes"]
        cached = {
            f"{name}.{CHILD}" for name, a in description["attentions"].items() if not a["transforms"] and not a["cache"]
        }
        norms = [name for name in description["norms"] if type(model.get_submodule(name)) is not nn.RMSNorm]
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"it has no description of a block: {error}") from None
    if norms:
        return nn.RMSNorm.__name__, norms[0]
    held = {_full_name(kind) for kind in HELD}
    for name, kind in classes.items():
        if kind.startswith(OWN) and kind not in held and name not in cached:
            return kind.rpartition(".")[2], name
    return None


@torch.no_grad()
def rebuild(block: Block, path: pathlib.Path, network: Network, device: torch.device) -> None:
    """Puts the modules that `write_block` wrote into the block, in place of its own.

    Raises:
        Unbuildable: for a module of a class that has no ``from_description``.
    """
    with safe_open(path, framework="pt") as file:
        description: dict[str, Any] = parse_json(file.metadata()["description"])
        tensors = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
    model = network.model
    for name, facts in description["norms"].items():
        if type(model.get_submodule(name)) is not nn.RMSNorm:
            replace_module(model, name, nn.RMSNorm(facts["width"], facts["eps"], elementwise_affine=False))
    for name in description["reordered"]:
        replace_module(model, name, Reordered(model.get_submodule(name), tensors[f"{name}.order"]))
    shared: dict[str, InputQuantizer] = {}
    for name, facts in description["linears"].items():
        replace_module(model, name, _linear(name, facts, tensors, shared))
    for name, facts in description["attentions"].items():
        child = f"{name}.{CHILD}"
        known = {t: _input(f, f"{child}.quantizers.{t}", tensors) for t, f in facts["quantizers"].items()}
        transforms = {t: _built(f) for t, f in facts["transforms"].items()}
        made = AttentionQuantizers(known, transforms, _cache(facts["cache"])).to(device)
        attach_quantizers(model.get_submodule(name), made)
    for name in description["prefixes"]:
        before = Prefix(tensors[f"{name}.key"], tensors[f"{name}.value"])
        model.get_submodule(name.removesuffix(f".{PREFIX}")).add_module(PREFIX, before)
    for name, places in description["online"].items():
        for place, facts in places.items():
            attach = attach_input if place == INPUT else attach_output
            attach(model.get_submodule(name), _built(facts).to(device))
    prefix = f"{block.name}."
    plain = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for key, held in {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}.items():
        if key in plain and held.data_ptr() != plain[key].data_ptr():
            held.copy_(plain[key])
    now = {name: _class(module) for name, module in block.module.named_modules(prefix=block.name)}
    if now != description["classes"] or set(block.module.state_dict()) != set(plain):
        raise Unbuildable(f"{block.name} holds modules or parameters that are not known how to build again")


def _linear(
    name: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shared: dict[str, InputQuantizer]
) -> QuantLinear:
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    inputs = None
    if "inputs" in facts:
        first = facts["inputs"]["shared_with"]
        if first not in shared:
            shared[first] = _input(facts["inputs"], f"{first}.inputs", tensors)
        inputs = shared[first]
    spec, dtype = facts["spec"], getattr(torch, facts["dtype"])
    left, right = own.pop("left", None), own.pop("right", None)
    if spec is None:
        return QuantLinear(own["weight"].to(dtype), own.get("bias"), None, inputs)
    built = QuantLinear.from_stored(
        {key: t for key, t in own.items() if "." not in key and key not in {"bias", "labels"}},
        (facts["shape"][0], facts["shape"][1]), own.get("bias"), QuantSpec(**spec), inputs, dtype, own.get("labels"),
    )  # fmt: skip
    if left is not None and right is not None:
        built.correct(left, right)
    return built


def _cache(facts: Mapping[str, Any] | None) -> CacheFormats | None:
    if facts is None:
        return None
    forms = {tensor: None if facts[tensor] is None else CacheFormat(**facts[tensor]) for tensor in ("key", "value")}
    return CacheFormats(**forms, rotary=facts["rotary"])


def _input(facts: Mapping[str, Any], name: str, tensors: Mapping[str, torch.Tensor]) -> InputQuantizer:
    return InputQuantizer.from_stored(
        QuantSpec(**facts["spec"]), facts["low"], facts["high"], tensors.get(f"{name}.scale"),
        tensors.get(f"{name}.zero_point"), tensors.get(f"{name}.labels"),
    )  # fmt: skip


def _quantizer(module: InputQuantizer) -> dict[str, Any]:
    low, high = module.limits
    return {"spec": _spec(module.spec), "low": low, "high": high}


def _class(module: nn.Module) -> str:
    return _full_name(type(module))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _spec(spec: QuantSpec | None) -> dict[str, Any] | None:
    return None if spec is None else dataclasses.asdict(spec)


def _online(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, OnlineShared):
        return {"class": _class(module), "description": _online(module.inner)}
    facts = module.description() if hasattr(module, "description") else None  # type: ignore[operator]
    return {"class": _class(module), "description": facts}


def _built(facts: Mapping[str, Any]) -> nn.Module:
    """Builds an online transform of this package's own classes again; its tensors are read by name afterwards."""
    # Only classes that have registered themselves: a file names a class, and must not choose what is imported.
    if facts["class"] == "quantize.modules.online.OnlineShared":
        return OnlineShared(_built(facts["description"]))
    kind = ONLINE.get(facts["class"])
    if kind is None or facts["description"] is None:
        raise Unbuildable(f"{facts['class']} has no description to be built from again")
    module: nn.Module = kind.from_description(facts["description"])
    return module


ONLINE: dict[str, type[OnlineHadamard | OnlineBlocks | OnlineKronecker]] = {
    _full_name(kind): kind for kind in (OnlineHadamard, OnlineBlocks, OnlineKronecker)
}
"""Classes of online transforms by their full name that have ``description`` and ``from_description``."""
