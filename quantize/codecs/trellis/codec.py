"""Trellis-coded weights (Tseng et al. 2024, QTIP): 2, 3 or 4 bits a weight, of which each takes part in several weights' values.

A tile of 16 x 16 weights is one sequence, row by row. Weight t has the value of a state of 12 bits, the bits of weights t, t - 1, ...
of its tile, the first ones' going on at the end of the tile (tail-biting), so that 256 weights of k bits take 256 k bits and no
more. Values are quantiles of N(0, 1), in an order that is a permutation by an integer hash: nothing of it is stored.
"""

from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import torch
from torch.nn import functional

from quantize.codecs.base import Codec, Encoded, Layout, absmax, checked, divided, register, saturated
from quantize.codecs.packing import pack, packed_length, unpack
from quantize.codecs.table import Table
from quantize.codecs.trellis.viterbi import Viterbi
from quantize.spec.formats import Format
from quantize.spec.quant_spec import QuantSpec

SIDE = 16
"""Rows and columns of a tile."""
STATE_BITS = 12
"""L: a multiple of 2, 3 and 4."""
STATES = 1 << STATE_BITS
UNIT = 4096
"""Values are whole numbers of 1 / UNIT: no processor's rounding of a logarithm reaches them."""
GREATEST = 3.0
"""From where on, in standard deviations, weights count as beyond the values when a row's scale is chosen."""
DISTORTION = 0.073
"""Mean squared error at 2 bits on N(0, 1)."""
MULTIPLIERS = tuple(1.0 + 0.05 * i for i in range(41))
"""Scales that are looked at, times the root mean square of a row."""


class Trellis(Codec):
    """Codes of tiles under one float32 scale a row, which is the standard deviation of its weights or, with outliers, more."""

    proportional = True
    stacked_rows = SIDE

    def viterbi(self, spec: QuantSpec, device: torch.device) -> Viterbi:
        """Returns what searches codes of this format on `device`."""
        return Viterbi(state_values().on(device), spec.bits)

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a scale for each row of a weight (out, in), float32 (out, 1).

        The multiple m of the root mean square, 1 to 3, with the least m^2 `DISTORTION` plus mean squared excess over m `GREATEST`:
        a Gaussian row has 1.
        """
        greatest = absmax(weight)
        size = greatest * divided(weight, greatest).square().mean(-1, keepdim=True).sqrt()
        x = divided(weight, size).abs_()
        errors = torch.cat([m * m * DISTORTION + self._excess(x, m) for m in MULTIPLIERS], -1)
        return size * torch.tensor(MULTIPLIERS, device=weight.device)[errors.argmin(-1, keepdim=True)]

    def _excess(self, x: torch.Tensor, multiple: float) -> torch.Tensor:
        return (x - multiple * GREATEST).clamp_(min=0).square_().mean(-1, keepdim=True)

    def quantize(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes uint8 (tiles, 16 in), one a byte, of rows of tiles; scales float32 (out, 1), at last by least squares."""
        rows, columns = _shape(x.shape)
        scale = self.scale(x)
        normal = divided(x, scale)
        states = self.viterbi(spec, x.device).loops(sequences(normal))
        values = weights_of(state_values().on(x.device)[states], rows, columns)
        fitted = (normal * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True)
        return {"codes": codes_of(states, columns, spec.bits), "scale": scale * fitted.clamp_(min=0)}

    def dequantize(self, parts: Encoded, spec: QuantSpec, shape: Sequence[int]) -> torch.Tensor:
        """The state's value times the row's scale."""
        rows, columns = _shape(shape)
        codes = parts["codes"].reshape(-1, SIDE * SIDE).to(torch.int32)
        states = torch.zeros_like(codes)
        for age in range(STATE_BITS // spec.bits):
            states |= codes.roll(age, -1) << (age * spec.bits)
        return weights_of(state_values().on(codes.device)[states].t(), rows, columns) * parts["scale"]

    def encode(self, x: torch.Tensor, spec: QuantSpec) -> Encoded:
        """Codes packed at the format's bits, a row of tiles after another. Raises `ValueError` as `Codec.encode`."""
        parts = self.quantize(checked(x), spec)
        return {**parts, "codes": pack(parts["codes"], spec.bits)}

    def decode(
        self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns the weight of `shape` (out, in) that `stored` stands for, in `dtype`."""
        codes = unpack(stored["codes"], spec.bits, SIDE * shape[-1])
        return saturated(self.dequantize({**stored, "codes": codes}, spec, shape), dtype)

    def rows(self, stored: Encoded, spec: QuantSpec, shape: Sequence[int], index: torch.Tensor) -> Encoded:
        """Refused: `ValueError`."""
        raise ValueError(f"format: {spec.format!r} stores tiles of {SIDE} rows, and no row by itself")

    def layout(self, shape: Sequence[int], spec: QuantSpec) -> Layout:
        """Codes (tiles, bytes) of rows of tiles, the last of which may have fewer than 16 rows; scales (out, 1)."""
        rows, columns = _shape(shape)
        codes = (-(-rows // SIDE), packed_length(SIDE * columns, spec.bits))
        return {"codes": (codes, torch.uint8), "scale": ((rows, 1), torch.float32)}


@cache
def state_values() -> Table:
    """Returns the values of the states: of a state the quantile of the rank that `permuted` gives it."""
    normal = NormalDist()
    quantiles = [round(normal.inv_cdf((rank + 0.5) / STATES) * UNIT) / UNIT for rank in range(STATES)]
    return Table([quantiles[permuted(state, STATE_BITS)] for state in range(STATES)])


def permuted(state: int, bits: int) -> int:
    """Returns where a state of so many bits goes in a permutation: multiplications by an odd number, each followed by a shift."""
    for _ in range(3):
        state = (state * 0x6D5 + 0x3C7) % (1 << bits)
        state ^= state >> bits // 2
    return state


def sequences(x: torch.Tensor) -> torch.Tensor:
    """Returns the tiles of `x` (rows, columns) as sequences (256, tiles), tiles by rows; missing rows are zeros."""
    x = functional.pad(x, (0, 0, 0, -len(x) % SIDE))
    return x.unflatten(0, (-1, SIDE)).unflatten(-1, (-1, SIDE)).permute(1, 3, 0, 2).reshape(SIDE * SIDE, -1)


def weights_of(found: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns (rows, columns) of sequences (256, tiles): the inverse of `sequences`."""
    tiles = found.view(SIDE, SIDE, -1, columns // SIDE)
    return tiles.permute(2, 0, 3, 1).reshape(-1, columns)[:rows]


def codes_of(states: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Returns the codes, uint8 (rows of tiles, 16 columns), that sequences of states (256, tiles) shift in."""
    return (states & ((1 << bits) - 1)).to(torch.uint8).t().reshape(-1, SIDE * columns)


def _shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns rows and columns. `ValueError` where they are not those of a weight in tiles."""
    if len(shape) != 2 or shape[1] % SIDE or not shape[1]:
        raise ValueError(
            f"format: 'trellis' codes tiles of {SIDE} columns, and {SIDE} does not divide those of {tuple(shape)}: "
            f"use int with granularity channel there"
        )
    return shape[0], shape[1]


register(
    "trellis",
    Format((2, 3, 4), ("channel",), activation=False, instead="int with granularity group", columns=16),
    Trellis(),
)
