"""A scheme resolved: which `QuantSpec` each tensor of one Linear gets."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from ptq.config import TENSORS, SchemeConfig
from ptq.errors import UserError
from quantize.spec import QuantSpec


@dataclass(frozen=True)
class LinearSpecs:
    """The specs of one Linear; `output` is that of the query, key or value that it computes."""

    weight: QuantSpec | None
    input: QuantSpec | None
    output: QuantSpec | None

    @property
    def any(self) -> bool:
        """Whether anything of this Linear is quantized."""
        return any((self.weight, self.input, self.output))


def resolve(scheme: SchemeConfig, name: str, role: str | None) -> LinearSpecs:
    """Returns the specs of the Linear `name`, whose role is query, key, value or None. Of the overrides the last match wins."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in scheme.exclude):
        return LinearSpecs(None, None, None)
    specs: dict[str, QuantSpec | None] = {tensor: getattr(scheme, tensor) for tensor in TENSORS}
    for override in scheme.overrides:
        if fnmatch.fnmatchcase(name, override.modules):
            specs.update(override.tensors)
    return LinearSpecs(specs["weight"], specs["input"], specs[role] if role else None)


def check_scheme(scheme: SchemeConfig, linears: Mapping[str, tuple[int, int]]) -> None:
    """Checks a scheme against the shapes (out, in) of a model's Linears by full name.

    Raises:
        UserError: for a pattern that matches no Linear, or a group size that does not divide a Linear's input.
    """
    for i, override in enumerate(scheme.overrides):
        _matches(f"scheme.overrides[{i}].modules", override.modules, linears)
    for i, pattern in enumerate(scheme.exclude):
        _matches(f"scheme.exclude[{i}]", pattern, linears)
    for name, (rows, columns) in linears.items():
        specs = resolve(scheme, name, None)
        for tensor, spec in (("weight", specs.weight), ("input", specs.input)):
            _divides(f"scheme.{tensor}.group_size", spec, columns, name)
        for tensor in ("query", "key", "value"):
            _divides(f"scheme.{tensor}.group_size", getattr(scheme, tensor), rows, name)


def check_roles(scheme: SchemeConfig, roles: Mapping[str, str]) -> None:
    """Raises `UserError` when the scheme names query, key or value and no Linear of the model computes it alone."""
    wanted = {
        t for t in ("query", "key", "value") if getattr(scheme, t) or any(o.tensors.get(t) for o in scheme.overrides)
    }
    for tensor in sorted(wanted - set(roles.values())):
        raise UserError(
            f"scheme.{tensor}: no Linear of this model computes the {tensor} by itself (fused projection): use null"
        )


def _matches(field: str, pattern: str, names: Mapping[str, tuple[int, int]]) -> None:
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
        raise UserError(f"{field}: {pattern!r} matches no Linear: names look like {next(iter(names))!r}")


def _divides(field: str, spec: QuantSpec | None, size: int, name: str) -> None:
    if spec is None or spec.group_size is None or size % spec.group_size == 0:
        return
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    close = min(divisors, key=lambda d: (abs(d - spec.group_size), d))  # type: ignore[operator]
    raise UserError(f"{field}: {spec.group_size} does not divide the {size} channels of {name}: use {close}")
