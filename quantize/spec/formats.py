"""What each number format allows: the facts that `QuantSpec` is checked against, registered beside each codec."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType


@dataclass(frozen=True)
class Format:
    """What a format allows.

    Attributes:
        bits: widths of a code, the usual one first.
        granularities: what may share a scale, the usual one first.
        group_size: values in a group as the format is defined or usually used, with granularity group.
        fixed_group: the group size is part of the format.
        weight: whether weights can have it.
        activation: whether activations can have it.
        instead: what to use where they cannot.
        double_quant: whether its scales can be quantized in turn.
        affine: integer codes on a grid, which a solver or statistics may choose.
        scales: types of the scales that a weight has a choice of, the usual one first (`QuantSpec.scales`).
        static: granularity with which an activation may have its tensor's scale from statistics, where it is not affine; None
            where it may not.
        columns: what the number of a weight's columns has to be a multiple of, whatever shares a scale.
    """

    bits: tuple[int, ...]
    granularities: tuple[str, ...]
    group_size: int | None = None
    fixed_group: bool = False
    weight: bool = True
    activation: bool = True
    instead: str = ""
    double_quant: bool = False
    affine: bool = False
    scales: tuple[str, ...] = ("float32",)
    static: str | None = None
    columns: int = 1


INTEGER = "int"
_FORMATS: dict[str, Format] = {}


def register_format(name: str, form: Format) -> None:
    """Makes `form` known as `name`, the format's name in a recipe; called where its codec is written.

    Raises:
        ValueError: when another format has that name.
    """
    if _FORMATS.setdefault(name, form) != form:
        raise ValueError(f"format: {name!r} is registered already: choose another name")
    formats.cache_clear()


@cache
def formats() -> Mapping[str, Format]:
    """Returns every format by its name in a recipe, ``int`` first. The codecs are read when they are first asked for: they
    need torch.
    """
    importlib.import_module("quantize.codecs.registry")
    names = sorted(_FORMATS, key=lambda name: (name != INTEGER, name))
    return MappingProxyType({name: _FORMATS[name] for name in names})
