"""What each number format allows: the facts that `QuantSpec` is checked against, and the usual spec of each name."""

from dataclasses import dataclass


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


INTEGER = "int"
_EVERY = ("channel", "tensor", "token", "group", "cluster")
_FLOAT8 = ("channel", "tensor", "token", "group")
FORMATS: dict[str, Format] = {
    INTEGER: Format((8, 2, 3, 4, 5, 6, 7), _EVERY, affine=True),
    "nf4": Format((4,), ("group",), 64, activation=False, instead="mxfp4", double_quant=True),
    "fp4": Format((4,), ("group",), 64, activation=False, instead="mxfp4", double_quant=True),
    "fp8_e4m3": Format((8,), _FLOAT8),
    "fp8_e5m2": Format((8,), _FLOAT8),
    "mxfp4": Format((4,), ("group",), 32, True),
    "mxfp8": Format((8,), ("group",), 32, True),
    "mxfp8_e5m2": Format((8,), ("group",), 32, True),
    "nvfp4": Format((4,), ("group",), 16, True),
    "q8_0": Format((8,), ("group",), 64, activation=False, instead="int with granularity group"),
    "q8_0_gguf": Format((8,), ("group",), 32, True, activation=False, instead="int with granularity group"),
    "llm_int8": Format((8,), ("token",), weight=False, instead="int with bits 8, granularity channel"),
}
"""Every format by its name in a recipe. A format other than ``int`` has its codec in `quantize.codecs`."""
