"""`QuantSpec`: the number format of one tensor."""

from dataclasses import dataclass

FORMATS = ("int",)
GRANULARITIES = ("tensor", "token", "channel", "group", "cluster")
RANGES = ("minmax", "percentile", "mse", "ema")
SCALES = ("float32", "float16", "float16_min")


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
        format: number format; ``int`` is integer affine quantization.
        granularity: what shares one scale: the whole ``tensor``, a ``token`` (a row of an activation), a ``channel``
            (an output row of a weight, an input channel of an activation), a ``group`` of `group_size` consecutive
            values along the last dimension, or a ``cluster`` of input channels named by labels (for a weight: of one row).
        group_size: values in a group; only with granularity ``group``. It has to divide the last dimension.
        symmetric: absmax scaling without a zero point (codes in ±(2^(bits-1) - 1)), or a zero point (0 .. 2^bits - 1).
        dynamic: ranges taken from each call's own values (activations only); otherwise from statistics.
        range: how a range is chosen: ``minmax``, ``percentile``, ``mse`` (search for the least squared error), or ``ema``
            (running mean of the samples' minima and maxima: static activations only).
        percentile: share in percent of the values inside the range, with range ``percentile``.
        scales: type of the scales: ``float32``, ``float16`` (GGUF's Q8_0 and Q4_0), or ``float16_min`` (the least value,
            scale x zero point, is exact in fp16 too: GGUF's Q4_1). Weights only.
        full_range: a symmetric format that uses the code -2^(bits-1) too, with a step of 2 absmax / (2^bits - 1), as
            compressed-tensors rounds at run time. Activations only.
    """

    bits: int = 8
    format: str = "int"
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    range: str = "minmax"
    percentile: float = 99.99
    scales: str = "float32"
    full_range: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError("bits", self.bits, f"2 to 8 (nearest: {min(max(self.bits, 2), 8)})")
        for field, choices in (
            ("format", FORMATS),
            ("granularity", GRANULARITIES),
            ("range", RANGES),
            ("scales", SCALES),
        ):
            if getattr(self, field) not in choices:
                raise SpecError(field, getattr(self, field), f"one of {', '.join(choices)}", choices)
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
