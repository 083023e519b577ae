"""A scheme resolved: which `QuantSpec` each tensor of one Linear gets."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ptq.config.schema import Override, SchemeConfig
from ptq.errors import UserError
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec
from quantize.spec.rules import TENSORS

ATTENTION_TENSORS = ("query", "key", "value", "attention_probs")


@dataclass(frozen=True)
class LinearSpecs:
    """The specs of one Linear."""

    weight: QuantSpec | None
    input: QuantSpec | None

    @property
    def any(self) -> bool:
        """Whether anything of this Linear is quantized."""
        return any((self.weight, self.input))


def with_weights(scheme: SchemeConfig, change: Callable[[QuantSpec | None], QuantSpec | None]) -> SchemeConfig:
    """Returns `scheme` with what `change` makes of every format of a weight: Linears', overrides', embedding's, head's."""
    overrides = tuple(
        Override(o.modules, {t: change(s) if t == "weight" else s for t, s in o.tensors.items()})
        for o in scheme.overrides
    )
    return replace(
        scheme,
        weight=change(scheme.weight),
        embedding=change(scheme.embedding),
        head=change(scheme.head),
        overrides=overrides,
    )


def tensor_specs(scheme: SchemeConfig, tensor: str) -> list[QuantSpec]:
    """Returns every format that the scheme has for one kind of tensor, such as ``weight``: its own and those of overrides."""
    found = [getattr(scheme, tensor), *(o.tensors.get(tensor) for o in scheme.overrides)]
    return [spec for spec in found if spec is not None]


def linear_specs(scheme: SchemeConfig, name: str) -> LinearSpecs:
    """Returns the specs of the Linear `name`. Of the overrides the last match wins."""
    if not scheme.exclude and not scheme.overrides:
        return LinearSpecs(scheme.weight, scheme.input)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in scheme.exclude):
        return LinearSpecs(None, None)
    specs: dict[str, QuantSpec | None] = {tensor: getattr(scheme, tensor) for tensor in ("weight", "input")}
    for override in scheme.overrides:
        if fnmatch.fnmatchcase(name, override.modules):
            specs.update(override.tensors)
    return LinearSpecs(specs["weight"], specs["input"])


def attention_specs(scheme: SchemeConfig, name: str) -> dict[str, QuantSpec]:
    """Returns the specs of query, key, value and attention_probs of the attention module `name`, without the null ones."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in scheme.exclude):
        return {}
    specs = {tensor: getattr(scheme, tensor) for tensor in ATTENTION_TENSORS}
    for override in scheme.overrides:
        if fnmatch.fnmatchcase(name, override.modules):
            specs.update({tensor: spec for tensor, spec in override.tensors.items() if tensor in ATTENTION_TENSORS})
    return {tensor: spec for tensor, spec in specs.items() if spec is not None}


def attention_tensors(scheme: SchemeConfig) -> set[str]:
    """Returns which of query, key, value and attention_probs the scheme quantizes somewhere."""
    return {tensor for tensor in ATTENTION_TENSORS if tensor_specs(scheme, tensor)}


def check_scheme(scheme: SchemeConfig, linears: Mapping[str, tuple[int, int]], head_dim: int) -> None:
    """Checks a scheme against a model: the shapes (out, in) of its Linears by full name, and its attention heads' channels.

    Raises:
        UserError: for a pattern that matches no Linear and no module that holds some, or a group size, or columns of tiles, that
            do not divide.
    """
    parents = {name.rpartition(".")[0] for name in linears}
    names = [*linears, *sorted(parents)]
    for i, override in enumerate(scheme.overrides):
        _matches(f"scheme.overrides[{i}].modules", override.modules, names)
    for i, pattern in enumerate(scheme.exclude):
        _matches(f"scheme.exclude[{i}]", pattern, names)
    _check_effect(scheme, list(linears), sorted(parents))
    for name, (_, columns) in linears.items():
        specs = linear_specs(scheme, name)
        for tensor, spec in (("weight", specs.weight), ("input", specs.input)):
            _divides(f"scheme.{tensor}.group_size", spec, columns, f"the {columns} channels of {name}")
        if specs.weight is not None and columns % formats()[specs.weight.format].columns:
            raise UserError(
                f"scheme.weight.format: {specs.weight.format!r} takes columns in multiples of "
                f"{formats()[specs.weight.format].columns}, and {name} has {columns}: use int there, by an override"
            )
    for parent in sorted(parents):
        for tensor, spec in attention_specs(scheme, parent).items():
            if tensor != "attention_probs":
                _divides(f"scheme.{tensor}.group_size", spec, head_dim, f"the {head_dim} channels of an attention head")


def _check_effect(scheme: SchemeConfig, linears: Sequence[str], attentions: Sequence[str]) -> None:
    """Raises `UserError` for an override or an exclusion without which every module would have the same formats, and for a
    scheme whose formats are nowhere.
    """

    def formats(of: SchemeConfig) -> list[object]:
        return [linear_specs(of, name) for name in linears] + [attention_specs(of, name) for name in attentions]

    everything = formats(scheme)
    without = {
        f"overrides[{i}]": replace(scheme, overrides=(*scheme.overrides[:i], *scheme.overrides[i + 1 :]))
        for i in range(len(scheme.overrides))
    } | {
        f"exclude[{i}]": replace(scheme, exclude=(*scheme.exclude[:i], *scheme.exclude[i + 1 :]))
        for i in range(len(scheme.exclude))
    }
    for field, other in without.items():
        if formats(other) == everything:
            raise UserError(f"scheme.{field}: changes nothing beside the rest of the scheme: leave it out")
    asked = any(getattr(scheme, tensor) for tensor in TENSORS) or bool(scheme.overrides)
    if asked and not any(found.any if isinstance(found, LinearSpecs) else found for found in everything):
        raise UserError("scheme: quantizes nothing, overrides and exclude leave nothing of it: leave some of them out")


def check_attention(scheme: SchemeConfig, attentions: int) -> None:
    """Raises `UserError` when the scheme quantizes something inside attentions, and none of them can be reached."""
    wanted = sorted(attention_tensors(scheme))
    if wanted and not attentions:
        raise UserError(
            f"scheme.{wanted[0]}: this model's attention does not use transformers' attention interface, "
            f"so its {wanted[0]} cannot be reached: use null"
        )


def _matches(field: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
        raise UserError(f"{field}: {pattern!r} matches no Linear: names look like {names[0]!r}")


def _divides(field: str, spec: QuantSpec | None, size: int, what: str) -> None:
    if spec is None or spec.group_size is None or size % spec.group_size == 0:
        return
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    close = min(divisors, key=lambda d: (abs(d - spec.group_size), d))  # type: ignore[operator]
    raise UserError(f"{field}: {spec.group_size} does not divide {what}: use {close}")
