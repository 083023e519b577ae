"""Linears replaced by packed ones, in place, in any torch module; and back."""

import dataclasses
import fnmatch
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ptq.config.checking import check_specs
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import LinearSpecs, attention_tensors, check_scheme, linear_specs
from ptq.config.shipped import scheme_named
from ptq.errors import UserError, nearest
from ptq.integrations.kernels import use_kernels_
from ptq.integrations.outside import choose_outside, dequantize_outside_, emptied_outside, quantize_outside_, share_
from ptq.network.network import is_linear, replace_module, weight_of
from quantize.codecs.base import checked
from quantize.modules.online import carry_online
from quantize.modules.packed import PackedLinear, packed_layout, packed_type
from quantize.modules.packed_embedding import PackedEmbedding
from quantize.modules.simulated import QuantLinear

METHOD = "ptq"
"""What config.json calls a model that was quantized here."""
HEAD = "lm_head"
"""The pattern that stands for the head, whatever it is called, and for every Linear tied to an embedding."""
Filter = Callable[[nn.Module, str], bool]
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that hand their Linears' weights to a fused kernel instead of calling the Linears."""


def quantize_(
    model: nn.Module,
    scheme: str | SchemeConfig = "w8a8",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (HEAD,),
    filter_fn: Filter | None = None,
) -> None:
    """Replaces the Linears (and transformers' Conv1D) of `model` by `quantize.modules.packed.PackedLinear`, in place.

    One weight is encoded at a time and let go before the next: the model never stands in memory twice. Everything is
    checked before the first replacement: when this raises, `model` is as it was. A transformers model remembers in its
    config how it was quantized: ``save_pretrained`` writes it, and ``from_pretrained`` gives it back quantized once
    `ptq.integrations.transformers` has been imported.

    Where the scheme has formats for the embedding and the head of a transformers model these are replaced too, whatever `include`
    and `exclude` say; tied ones share one weight. By default the head stays as it is, and so does every Linear that shares its weight with an embedding: the error of the
    head goes into the logits with nothing after it to average it out, and a tied weight is read by row as the embedding
    too, so that quantizing the Linear alone would store it twice.

    A pattern of `include` and `exclude` is a glob that matches a whole name or whole parts of it that follow each other:
    ``lm_head``, ``layers.0.mlp``, ``*.q_proj``, ``layers.1?``.

    Args:
        model: any module that holds Linears, with its weights.
        scheme: the name of a shipped scheme, or a scheme of one's own, for weights and inputs. Inputs have to be dynamic.
        include: when given, only Linears that match one of these.
        exclude: Linears that are left alone.
        filter_fn: given a module and its name, returns whether to replace it.

    Raises:
        UserError: for an unknown scheme or one that needs calibration or attention; a pattern that matches nothing; NaN,
            inf, integer or missing values in a weight; a group size that does not divide; a weight shared with another
            module; a model that is quantized or has no Linear to replace.
    """
    scheme = scheme_of(scheme)
    chosen = choose(model, scheme, include, exclude, filter_fn)
    outside = choose_outside(model, scheme, tied_of(model))
    skipped = _skipped(model, chosen, exclude)
    for name in chosen:
        _check_values(name, model.get_submodule(name))
    quantize_outside_(model, outside)
    for name, specs in chosen.items():
        old = model.get_submodule(name)
        kind, spec = packed_type(_weight(specs), specs.input), _weight(specs)
        new = kind.from_weight(weight_of(old), _bias(old), spec, specs.input)
        new.train(old.training)
        replace_everywhere(model, old, new)
        del old
    remember(model, scheme, skipped)
    use_kernels_(model)


@torch.no_grad()
def pack_(model: nn.Module, scheme: SchemeConfig | None = None) -> int:
    """Replaces the simulated Linears of `model`, with the codes that a solver has chosen, by packed ones, in place; returns how many.

    Those that cannot be packed stay as they are: static inputs, clusters, corrections of low rank.

    Args:
        model: with simulated Linears.
        scheme: what they were made by; where every one was packed and it says nothing of the attention, the model's config
            remembers it, so that the model can be saved and loaded.
    """
    simulated = {
        name: m for name, m in model.named_modules() if isinstance(m, QuantLinear) and m.weight_spec is not None
    }
    packed = []
    for name, old in simulated.items():
        try:
            new = PackedLinear.from_quantized(old)
        except ValueError:
            continue
        carry_online(old, new)
        new.train(old.training)
        replace_everywhere(model, old, new)
        packed.append(name)
    if scheme is not None and len(packed) == len(simulated) and not attention_tensors(scheme):
        # Embedding and head hold their rounded weights in the model's own type.
        linears = dataclasses.replace(scheme, embedding=None, head=None)
        remember(model, linears, _skipped(model, packed, (HEAD,)))
    return len(packed)


def prepare_(
    model: nn.Module,
    scheme: str | SchemeConfig = "w8a8",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (HEAD,),
    filter_fn: Filter | None = None,
) -> None:
    """Does what `quantize_` does without any values: the packed Linears are empty, on the device of the old ones.

    For a model on the meta device whose quantized weights are loaded later: ``load_state_dict(state, assign=True)``.
    Arguments and errors as `quantize_`.
    """
    scheme = scheme_of(scheme)
    chosen = choose(model, scheme, include, exclude, filter_fn)
    outside = choose_outside(model, scheme, tied_of(model))
    skipped = _skipped(model, chosen, exclude)
    for name, specs in chosen.items():
        old = model.get_submodule(name)
        replace_everywhere(model, old, emptied(old, specs))
    for one in outside:
        old = model.get_submodule(one.name)
        replace_everywhere(model, old, emptied_outside(old, one.spec))
        if one.tied:
            share_(model, one.name, outside[0].name)
    remember(model, scheme, skipped)
    use_kernels_(model)


@torch.no_grad()
def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replaces every packed Linear of `model`, and a packed embedding, by a plain one that holds what its codes stand for, in place, one at a time.

    What rounding took away stays away, and inputs are no longer rounded.

    Args:
        model: a quantized module.
        dtype: of the weights; None for the type of the model's first parameter that was not quantized, or fp32.

    Raises:
        UserError: for a model without packed Linears, or one whose codes are not in memory.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise UserError(f"model: {type(model).__name__} holds no quantized Linear: there is nothing to dequantize")
    if isinstance(model, PackedLinear):
        raise UserError("model: is itself a Linear: give the module that holds it")
    away = [name for name, module in packed.items() if any(tensor.is_meta for tensor in module.stored.values())]
    if away:
        raise UserError(f"{away[0]}: its codes are on the meta device or offloaded: load the model into memory first")
    dtype = dtype or plain_dtype(model)
    del packed
    dequantize_outside_(model, dtype)
    for name in [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        old: Any = model.get_submodule(name)
        bias = old.bias
        new = nn.Linear(old.in_features, old.out_features, bias is not None, device="meta")
        new.weight = nn.Parameter(old.dequantized(dtype), requires_grad=False)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        new.train(old.training)
        replace_everywhere(model, old, new)
        del old, bias
    forget(model)


def scheme_of(scheme: str | SchemeConfig) -> SchemeConfig:
    """Returns the scheme that `scheme` names or is, checked for what a packed Linear can compute.

    Raises:
        UserError: for an unknown name, specs that a tensor cannot have, and what needs more than the Linears themselves:
            static ranges, clusters, tensors of the attention.
    """
    scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
    check_specs(scheme)
    if tensors := sorted(attention_tensors(scheme)):
        raise UserError(
            f"scheme.{tensors[0]}: is no tensor of a Linear: use null here, or a recipe with python main.py"
        )
    pairs = [("scheme", {"weight": scheme.weight, "input": scheme.input})]
    pairs += [(f"scheme.overrides[{i}]", dict(o.tensors)) for i, o in enumerate(scheme.overrides)]
    for path, specs in pairs:
        if (spec := specs.get("input")) is not None and not spec.dynamic:
            raise UserError(f"{path}.input.dynamic: false needs calibration: use dynamic true, or a recipe")
        if (spec := specs.get("weight")) is not None and spec.granularity == "cluster":
            raise UserError(
                f"{path}.weight.granularity: 'cluster' needs a step that clusters: use channel, or a recipe"
            )
    return scheme


def choose(
    model: nn.Module,
    scheme: SchemeConfig,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (HEAD,),
    filter_fn: Filter | None = None,
    known: bool = True,
) -> dict[str, LinearSpecs]:
    """Returns the specs of every Linear to replace by its first name, having checked all that needs no values.

    Args:
        model: see `quantize_`.
        scheme: a scheme that `scheme_of` has passed.
        include: see `quantize_`.
        exclude: see `quantize_`.
        filter_fn: see `quantize_`.
        known: whether a pattern of `exclude` that matches nothing is an error.

    Raises:
        UserError: as `quantize_`.
    """
    _check_fresh(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if "" in linears:
        raise UserError("model: is itself a Linear: give the module that holds it")
    for field, patterns in (("include", include), ("exclude", exclude if known else ())):
        for pattern in patterns:
            if pattern != HEAD and not any(_matches(name, pattern) for name in linears):
                last = {name.rpartition(".")[2] for name in linears}
                raise UserError(f"{field}: {pattern!r} matches no Linear{nearest(pattern, sorted({*linears, *last}))}")
    tied = tied_of(model)
    heads = _heads(model, linears, tied) if HEAD in exclude else set()
    heads |= {one.name for one in choose_outside(model, scheme, tied)}
    candidates = {}
    for name, module in linears.items():
        left = any(_matches(name, pattern) for pattern in exclude) or name in heads
        if left or (include and not any(_matches(name, pattern) for pattern in include)):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if not _read_by_parent(model, name):
            candidates[name] = linear_specs(scheme, name)
    chosen = {name: specs for name, specs in candidates.items() if specs.any}
    if not chosen:
        raise UserError(
            f"model: {type(model).__name__} holds no Linear to quantize with this scheme, include and exclude"
        )
    check_scheme(scheme, {name: _shape(linears[name]) for name in candidates}, head_dim=1)
    for name, specs in chosen.items():
        _check_one(name, linears[name], specs, tied.get(f"{name}.weight"))
    return chosen


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = weight_of(module).shape
    return rows, columns


def _check_one(name: str, module: nn.Module, specs: LinearSpecs, tied: str | None) -> None:
    if specs.weight is None:
        raise UserError(f"scheme.weight: null for {name}, whose input is quantized: give its weight a format too")
    if tied is not None:
        raise UserError(f"{name}.weight: is {tied} too, and would no longer be shared: put {name!r} into exclude")
    if hasattr(module, "_hf_hook"):
        raise UserError(
            f"{name}: accelerate has placed it: quantize before, or while loading with quantization_config=PtqConfig(...)"
        )
    try:
        packed_layout(*_shape(module), specs.weight, specs.input)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _check_fresh(model: nn.Module) -> None:
    """Raises `UserError` for a model that is quantized, by this framework or another."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | QuantLinear | PackedEmbedding):
            raise UserError(f"model: already quantized ({name} is a {type(module).__name__}): use dequantize_ first")
    # Our own entry says what a model without weights is about to become, or comes from a model that shares the config.
    found: Any = _config_entry(model)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", METHOD)
    if method != METHOD:
        raise UserError("model: already quantized, says its config: load the original weights")


def _config_entry(model: nn.Module) -> object:
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _check_values(name: str, module: nn.Module) -> None:
    try:
        checked(weight_of(module))
    except ValueError as error:
        more = ": load its weights first, or use prepare_" if weight_of(module).is_meta else ""
        raise UserError(f"{name}.weight: {error}{more}".replace("the weight ", "")) from None


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    runs = itertools.combinations(range(len(parts) + 1), 2)
    return any(fnmatch.fnmatchcase(".".join(parts[i:j]), pattern) for i, j in runs)


def tied_of(model: nn.Module) -> dict[str, str]:
    """Returns another name of every parameter that has one, by every name but that of the same module elsewhere."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    tied = {name: next(n for n in group if n != name) for group in names.values() if len(group) > 1 for name in group}
    # Before transformers has loaded a model, the parameters that it is going to tie are still apart.
    going_to: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if going_to and next(model.parameters()).is_meta:
        tied = {**{source: target for target, source in going_to.items()}, **going_to, **tied}
    return tied


def _heads(model: nn.Module, linears: Mapping[str, nn.Module], tied: Mapping[str, str]) -> set[str]:
    """Returns the Linears that make the logits or share their weight with an embedding."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    shared = {name for name in linears if tied.get(f"{name}.weight", "").rpartition(".")[0] in embeddings}
    return shared | {name for name, module in linears.items() if module is output}


def _read_by_parent(model: nn.Module, name: str) -> bool:
    """Returns whether the module around the Linear `name` reads its weight instead of calling it."""
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), _READS_WEIGHTS)


def _skipped(model: nn.Module, chosen: Iterable[str], exclude: Sequence[str]) -> list[str]:
    """Returns the patterns of `exclude` and the names of all other Linears that were not chosen."""
    chosen = set(chosen)
    left = [name for name, module in model.named_modules() if is_linear(module) and name not in chosen]
    return [*exclude, *(name for name in left if not any(_matches(name, pattern) for pattern in exclude))]


def _weight(specs: LinearSpecs) -> Any:
    return specs.weight


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = module.bias
    return bias if isinstance(bias, torch.Tensor) else None


def emptied(module: nn.Module, specs: LinearSpecs) -> PackedLinear:
    """Returns an empty packed Linear of the shape of a Linear or Conv1D, on its device."""
    (rows, columns), bias, weight = weight_of(module).shape, _bias(module), _weight(specs)
    old = weight_of(module)
    kind = packed_type(weight, specs.input)
    new = kind(columns, rows, bias is not None, weight, specs.input, old.dtype, old.device)
    new.train(module.training)
    return new


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in the place of `old` under every name that it has."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        replace_module(model, name, new)


def plain_dtype(model: nn.Module) -> torch.dtype:
    """Returns the type of the first floating-point parameter that no packed Linear holds; fp32 where there is none."""
    packed = (m for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding))
    held = {id(t) for m in packed for t in m.stored.values()}
    types = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in held)
    return next(types, torch.float32)


def remember(model: nn.Module, scheme: SchemeConfig, skipped: Sequence[str]) -> None:
    """Writes into a transformers model's config how it was quantized."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        config: Any = model.config
        config.quantization_config = record_of(scheme, skipped)


def forget(model: nn.Module) -> None:
    """Takes away what says that a transformers model is quantized."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    elif _config_entry(model) is not None:
        config: Any = model.config
        del config.quantization_config


def record_of(scheme: SchemeConfig, skipped: Sequence[str]) -> dict[str, Any]:
    """Returns what config.json says of a quantized model: the specs themselves, not the name of a scheme that may change."""
    specs = json.loads(json.dumps(dataclasses.asdict(scheme)))
    return {"quant_method": METHOD, "specs": specs, "skip_modules": list(skipped)}
