"""What a quantized weight takes when it is stored, from its shape alone: no values are needed."""

from dataclasses import dataclass

from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class Storage:
    """How many codes, scales and zero points a weight is stored as, and the bits of each; zero points have a code's bits."""

    codes: int
    scales: int
    zero_points: int
    code_bits: int
    scale_bits: int

    @property
    def bits(self) -> int:
        """Bits of the whole weight, codes packed without gaps."""
        return self.code_bits * (self.codes + self.zero_points) + self.scale_bits * self.scales


def weight_storage(rows: int, columns: int, spec: QuantSpec) -> Storage:
    """Returns what a weight (rows, columns) is stored as; `quantize.modules.simulated.QuantLinear.stored_bytes` counts the same.

    Raises:
        ValueError: for a group size that does not divide the columns, granularity cluster (the number of clusters comes
            from data, not from the shape), token (a weight has none), or a format that is not integer.
    """
    if not spec.affine:
        raise ValueError(f"format: {spec.format!r} is not made of codes and scales only: use Codec.layout")
    scales = {"tensor": 1, "channel": rows}.get(spec.granularity)
    if spec.granularity == "group" and spec.group_size is not None:
        if columns % spec.group_size:
            raise ValueError(f"group_size: {spec.group_size} does not divide the {columns} columns")
        scales = rows * (columns // spec.group_size)
    if scales is None:
        raise ValueError(
            f"granularity: {spec.granularity!r}: the number of scales does not follow from a shape: use channel or group"
        )
    return Storage(
        codes=rows * columns,
        scales=scales,
        zero_points=0 if spec.symmetric else scales,
        code_bits=spec.bits,
        scale_bits=32 if spec.scales == "float32" else 16,
    )
