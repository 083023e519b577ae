"""`QuantSpec`: the number format of one tensor."""

from dataclasses import dataclass, field
from typing import Any

from quantize.spec.formats import INTEGER, formats

GRANULARITIES = ("tensor", "token", "channel", "group", "cluster")
RANGES = ("minmax", "percentile", "mse", "ema")
SCALES = ("float32", "float16", "float16_min", "power_of_two")


class SpecError(ValueError):
    """A field of a `QuantSpec` that has no meaning. `field`, `value` and `choices` let a caller name the nearest valid one."""

    def __init__(self, field: str, value: object, expected: str, choices: tuple[str, ...] = ()):
        super().__init__(f"{field}: {value!r} is not valid: expected {expected}")
        self.field, self.value, self.expected, self.choices = field, value, expected, choices


@dataclass(frozen=True)
class QuantSpec:
    """The number format of one tensor.

    Attributes:
        bits: width of a code, 2 to 8.
        format: number format, one of `quantize.spec.formats.formats`; ``int`` is integer affine quantization. A format that is
            not ``int`` has its own rule for ranges, and is dynamic on activations, but for FP8 with one scale for the tensor, and
            for NVFP4, whose tensor's scale alone is then static.
        granularity: what shares one scale: the whole ``tensor``, a ``token`` (a row of an activation), a ``channel``
            (an output row of a weight, an input channel of an activation), a ``group`` of `group_size` consecutive
            values along the last dimension, or a ``cluster`` of input channels named by labels (for a weight: of one row).
        group_size: values in a group; only with granularity ``group``. It has to divide the last dimension.
        symmetric: absmax scaling without a zero point (codes in ±(2^(bits-1) - 1)), or a zero point (0 .. 2^bits - 1).
        dynamic: ranges taken from each call's own values (activations only); otherwise from statistics.
        range: how a range is chosen: ``minmax``, ``percentile``, ``mse`` (search for the least squared error), or ``ema``
            (running mean of the samples' minima and maxima: static activations only).
        percentile: share in percent of the values inside the range, with range ``percentile``.
        clip: share of the range from minimum to maximum that is kept, above 0, up to 1: what lies beyond saturates, and all
            else gets a finer grid. Activations only; the solver of a weight fits its own.
        scales: type of the scales: ``float32``, ``float16`` (GGUF's Q8_0 and Q4_0), ``float16_min`` (the least value,
            scale x zero point, is exact in fp16 too: GGUF's Q4_1), or, of ``nvfp4``, ``power_of_two`` (the tensor's scale,
            which Linears that a runtime multiplies as one can then share). Weights only.
        full_range: a symmetric format that uses the code -2^(bits-1) too, with a step of 2 absmax / (2^bits - 1), as
            compressed-tensors rounds at run time. Activations only.
        double_quant: quantize the scales too (QLoRA); formats ``nf4`` and ``fp4``.
        threshold: magnitude from which a channel is an outlier and stays in floating point; format ``llm_int8``.
    """

    bits: int = 8
    format: str = "int"
    granularity: str = field(default="channel", metadata={"choices": GRANULARITIES})
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    range: str = field(default="minmax", metadata={"choices": RANGES})
    percentile: float = 99.99
    clip: float = 1.0
    scales: str = field(default="float32", metadata={"choices": SCALES})
    full_range: bool = False
    double_quant: bool = False
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError("bits", self.bits, f"2 to 8 (nearest: {min(max(self.bits, 2), 8)})")
        for name, choices in (
            ("format", tuple(formats())),
            ("granularity", GRANULARITIES),
            ("range", RANGES),
            ("scales", SCALES),
        ):
            if getattr(self, name) not in choices:
                raise SpecError(name, getattr(self, name), f"one of {', '.join(choices)}", choices)
        if self.granularity == "group" and (self.group_size is None or self.group_size < 1):
            raise SpecError("group_size", self.group_size, "a positive number with granularity group, such as 64")
        if self.granularity != "group" and self.group_size is not None:
            raise SpecError("group_size", self.group_size, f"null with granularity {self.granularity}")
        if self.scales == "float16_min" and (self.symmetric or self.bits > 6):
            raise SpecError("scales", self.scales, "float16 for a symmetric format or one of more than 6 bits")
        if self.full_range and not self.symmetric:
            raise SpecError("full_range", self.full_range, "false without symmetric: every code is used already")
        if not 50 < self.percentile <= 100:
            raise SpecError("percentile", self.percentile, "a number above 50, up to 100")
        if not 0 < self.clip <= 1:
            raise SpecError("clip", self.clip, "a number above 0, up to 1 (nearest: 1.0)")
        if self.clip != 1 and self.range in {"percentile", "mse"}:
            raise SpecError("clip", self.clip, f"1.0 with range {self.range}, which chooses itself how much is kept")
        if self.percentile != 99.99 and self.range != "percentile":
            raise SpecError("percentile", self.percentile, f"99.99 with range {self.range}: only percentile reads it")
        self._check_format()

    def _check_format(self) -> None:
        """Raises `SpecError` for a field that the format does not allow, naming the nearest value that it does."""
        form, name = formats()[self.format], f"with format {self.format}"
        if self.bits not in form.bits:
            raise SpecError("bits", self.bits, f"{form.bits[0]} {name}")
        if self.granularity not in form.granularities:
            words = " or ".join(form.granularities)
            raise SpecError("granularity", self.granularity, f"{words} {name}", form.granularities)
        if form.fixed_group and self.group_size != form.group_size:
            raise SpecError("group_size", self.group_size, f"{form.group_size} {name}")
        if self.double_quant and not form.double_quant:
            able = tuple(key for key, value in formats().items() if value.double_quant)
            raise SpecError("double_quant", self.double_quant, f"false {name}: {' and '.join(able)} have it")
        if self.scales not in form.scales:
            why = "" if self.affine or len(form.scales) > 1 else ": it has its own type of scales"
            raise SpecError("scales", self.scales, f"{' or '.join(form.scales)} {name}{why}", form.scales)
        if self.threshold != 6.0 and self.format != "llm_int8":
            raise SpecError("threshold", self.threshold, f"6.0 {name}: only llm_int8 reads it")
        if not self.threshold > 0:
            raise SpecError("threshold", self.threshold, "a number above 0, such as 6.0")
        if self.format == INTEGER:
            return
        if not self.symmetric:
            raise SpecError("symmetric", self.symmetric, f"true {name}: only int has zero points")
        if self.range != "minmax":
            raise SpecError("range", self.range, f"minmax {name}: it fits its own scales")
        if self.full_range:
            raise SpecError("full_range", self.full_range, f"false {name}: only int has it")
        if self.clip != 1:
            raise SpecError("clip", self.clip, f"1.0 {name}: only int has it")

    @property
    def affine(self) -> bool:
        """Whether values lie on an integer grid, which a solver or statistics may choose."""
        return formats()[self.format].affine

    def check_weight(self) -> None:
        """Raises `SpecError` when a weight cannot have this format."""
        if not formats()[self.format].weight:
            raise SpecError("format", self.format, f"{formats()[self.format].instead} for a weight")

    def check_activation(self) -> None:
        """Raises `SpecError` when an activation cannot have this format, or not with static ranges."""
        if not formats()[self.format].activation:
            raise SpecError("format", self.format, f"{formats()[self.format].instead} for an activation")
        static = formats()[self.format].static
        if not self.affine and not self.dynamic and static is None:
            raise SpecError("dynamic", self.dynamic, f"true with format {self.format}: it fits its scales at each call")
        if not self.affine and not self.dynamic and static is not None and self.granularity != static:
            raise SpecError(
                "granularity", self.granularity, f"{static} with format {self.format} and dynamic false", (static,)
            )
        if not self.affine and self.granularity == "channel":
            raise SpecError(
                "granularity", self.granularity, "token or tensor: a channel of an activation has no dynamic range"
            )


def spec_of(name: str, activation: bool = False, **changes: Any) -> QuantSpec:
    """Returns the usual spec of the format `name`, such as ``spec_of("nf4", double_quant=True)``.

    Args:
        name: a format of `quantize.spec.formats.formats`.
        activation: for an activation: dynamic, per token where the format has a choice.
        changes: fields of `QuantSpec` that differ from the usual ones.

    Raises:
        SpecError: for a format or field value that is not valid.
    """
    if name not in formats():
        raise SpecError("format", name, f"one of {', '.join(formats())}", tuple(formats()))
    form = formats()[name]
    granularity = "token" if activation and "token" in form.granularities else form.granularities[0]
    usual = {"bits": form.bits[0], "granularity": granularity, "group_size": form.group_size, "dynamic": activation}
    return QuantSpec(format=name, **{**usual, **changes})
