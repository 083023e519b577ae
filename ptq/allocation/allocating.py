"""From costs and a budget to a recipe: each group of Linears gets the format with which all together cost least."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ptq.allocation.budget import Budget
from ptq.allocation.candidates import stored_bytes, total_bytes, uniform
from ptq.allocation.knapsack import allocate
from ptq.allocation.sensitivity import Sensitivity
from ptq.config.options import MISSING, default_of
from ptq.config.schema import Override, Recipe, SchemeConfig
from ptq.config.scheme import linear_specs
from ptq.errors import UserError
from ptq.network.network import Network
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class Allocation:
    """A format for each Linear.

    Attributes:
        formats: by full name of a Linear the name of its format.
        bytes: what all of them take.
        bits: the same as an average over weights.
        cost: the predicted KL to the baseline, nats a token.
    """

    formats: dict[str, str]
    bytes: int
    bits: float
    cost: float


def allocated(found: Sensitivity, budget: int, asked: str) -> Allocation:
    """Returns the allocation within `budget` bytes whose predicted KL is least.

    Args:
        found: what each Linear costs in each format.
        budget: bytes of all these weights.
        asked: the option that gave it and its value, for messages.

    Raises:
        UserError: for a budget below what the smallest formats take, or one at which every Linear can have its largest.
    """
    forms = list(found.formats)
    sizes = [
        [sum(stored_bytes(found.shapes[n], found.formats[f]) for n in group) for f in forms] for group in found.groups
    ]
    losses = [[sum(found.costs[n][f] for n in group) for f in forms] for group in found.groups]
    count = sum(out * columns for out, columns in found.shapes.values())
    least, most = (sum(pick(group) for group in sizes) for pick in (min, max))
    if budget < least:
        raise _below(asked, min(forms, key=found.uniform_bits), least, budget, count)
    if budget >= most:
        high = max(forms, key=found.uniform_bits)
        raise UserError(
            f"{asked}: above the largest: {high} everywhere takes {8 * most / count:.4f} bits a weight, and the budget allows "
            f"{8 * budget / count:.4f}, so that there is nothing to choose: use less, or larger --formats"
        )
    chosen = [forms[i] for i in allocate(sizes, losses, budget)]
    formats = {name: form for group, form in zip(found.groups, chosen, strict=True) for name in group}
    size = sum(stored_bytes(found.shapes[name], found.formats[form]) for name, form in formats.items())
    return Allocation(formats, size, 8 * size / count, sum(found.costs[name][form] for name, form in formats.items()))


def check_budget(formats: Mapping[str, QuantSpec], network: Network, recipe: Recipe, budget: Budget) -> None:
    """Raises `UserError` for a budget that even the smallest formats exceed, before anything is measured.

    Args:
        formats: the candidates by name.
        network: the model, without weights.
        recipe: its scheme says which Linears count; where embedding or head do too, only what is measured tells.
        budget: what the weights may take.
    """
    if recipe.scheme.embedding is not None or recipe.scheme.head is not None:
        return
    shapes = {n: shape for n, shape in network.shapes.items() if linear_specs(recipe.scheme, n).weight is not None}
    count = sum(out * columns for out, columns in shapes.values())
    least = sum(min(stored_bytes(shape, spec) for spec in formats.values()) for shape in shapes.values())
    # With the narrowest type that the other weights can have: what does not fit so fits in no way.
    room = budget.room(count, recipe, network, 2)
    if count and room < least:
        low = min(formats, key=lambda form: total_bytes(shapes, formats[form]))
        raise _below(budget.words, low, least, room, count)


def _below(asked: str, low: str, least: int, budget: int, count: int) -> UserError:
    return UserError(
        f"{asked}: below the smallest: {low} everywhere takes {8 * least / count:.4f} bits a weight, {least} bytes of quantized "
        f"weights, and the budget leaves {8 * budget / count:.4f}: use more, or smaller --formats"
    )


def best_uniform(found: Sensitivity, budget: int) -> str | None:
    """Returns the format that within `budget` bytes is predicted to cost least when all Linears have it, None where none fits."""
    fitting = [form for form, spec in found.formats.items() if total_bytes(found.shapes, spec) <= budget]
    return min(fitting, key=found.uniform_cost, default=None)


def scheme_of(scheme: SchemeConfig, allocation: Allocation, found: Sensitivity) -> SchemeConfig:
    """Returns `scheme` with the weights' formats of `allocation`: the most frequent as its own, overrides for the others."""
    formats = found.formats
    inside = {name: form for name, form in allocation.formats.items() if name not in found.outside}
    weights = Counter(inside.values())
    usual = max(weights, key=lambda form: (weights[form], form))
    base = uniform(scheme, formats[usual])
    overrides = []
    for form in formats:
        names = [name for name, chosen in inside.items() if chosen == form]
        if form != usual:
            patterns = globs(names)
            overrides += [Override(pattern, {"weight": formats[form]}) for pattern in patterns]
    made = {tensor: formats[allocation.formats[name]] for name, tensors in found.outside.items() for tensor in tensors}
    return dataclasses.replace(
        base,
        embedding=made.get("embedding"),
        head=made.get("head"),
        overrides=(*base.overrides, *overrides),
    )


def globs(names: Sequence[str]) -> list[str]:
    """Returns few globs that match `names` and no other names, in order.

    Names that differ in one character are matched by a set of characters: ``model.layers.3.self_attn.[kqv]_proj``.
    """
    left, found = list(names), []
    while left:
        first = left.pop(0)
        found.append(first)
        for place in reversed(range(len(first))):
            alike = [n for n in left if len(n) == len(first) and n[:place] + n[place + 1 :] == first[:place] + first[place + 1 :]]  # fmt: skip
            letters = sorted({first[place], *(n[place] for n in alike)})
            if alike and all(letter.isalnum() for letter in letters):
                found[-1] = f"{first[:place]}[{''.join(letters)}]{first[place + 1 :]}"
                left = [n for n in left if n not in alike]
                break
    return found


def recipe_text(recipe: Recipe, head: Sequence[str]) -> str:
    """Returns a recipe as YAML, without what has its default, under the lines `head` as comments."""
    content = yaml.safe_dump(_changed(recipe), sort_keys=False, allow_unicode=True, width=120)
    return "".join(f"# {line}\n" for line in head) + content


def _changed(value: Any) -> Any:
    """Returns what of a dataclass is not its default, as plain containers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for field in dataclasses.fields(value):
            given, usual = getattr(value, field.name), default_of(field)
            if usual is MISSING or given != usual:
                found[field.name] = _changed(given)
        return found
    if isinstance(value, Mapping):
        return {str(key): _changed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(item) for item in value]
    return value
