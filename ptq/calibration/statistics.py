"""Calibration statistics: running per-channel figures of every Linear's input and of its weight, as a file with provenance."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ptq.errors import UserError
from ptq.files.atomic import write_atomic
from ptq.files.bounded import parse_json

FILE_KIND = "ptq-statistics/1"
CHUNK_ROWS = 512
"""Rows summed in float32 before they are merged in float64: short enough for float32, and they stay in cache."""
_FIELDS = ("min", "max", "mean", "m2")
_WEIGHT_FIELDS = ("in_min", "in_max", "in_std", "out_min", "out_max", "out_std")
_KEYS = (*(f"input/{field}" for field in (*_FIELDS, "count")), *(f"weight/{field}" for field in _WEIGHT_FIELDS))


@dataclass
class ChannelStatistics:
    """Running figures of a tensor's channels over tokens.

    Attributes:
        min: least value, float32 (channels,).
        max: greatest value, float32 (channels,).
        mean: mean, float64 (channels,).
        m2: sum of squared distances from the mean, float64 (channels,).
        count: tokens seen.
    """

    min: torch.Tensor
    max: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> "ChannelStatistics":
        """Returns statistics of no token."""
        ends = [torch.full((channels,), end, device=device) for end in (torch.inf, -torch.inf)]
        zeros = [torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2)]
        return cls(ends[0], ends[1], zeros[0], zeros[1])

    @property
    def absmax(self) -> torch.Tensor:
        """Greatest magnitude, float32 (channels,)."""
        return torch.maximum(self.max.abs(), self.min.abs())

    @property
    def std(self) -> torch.Tensor:
        """Population standard deviation, float64 (channels,)."""
        return (self.m2 / max(self.count, 1)).clamp_min(0).sqrt()

    def update(self, x: torch.Tensor) -> None:
        """Adds the tokens of `x` (..., channels).

        Sums run in float32 over chunks of `CHUNK_ROWS` rows of one sample, relative to the chunk's first row (so a large mean
        costs no digits), and the chunks are merged in float64 by the formula of Chan, Golub and LeVeque, in order. Where `x`
        is (samples, ..., channels) the figures are the same bits however many samples come at once; any other split gives
        them to float64 rounding of chunk sums. NaN and inf end up in `min`, `max` or `mean`: see `is_finite`.
        """
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        # amin and amax in turn: torch.aminmax over rows is some twenty times slower on CPU.
        self.min = torch.minimum(self.min, rows.amin(0).float())
        self.max = torch.maximum(self.max, rows.amax(0).float())
        for sample in rows.view(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else (rows,):
            for chunk in sample.split(CHUNK_ROWS):
                shift = chunk[0].float()
                # In float32 first: in fp16 the distance of 40000 from -40000 is inf.
                centred = chunk.float() - shift
                mean = centred.mean(0)
                m2 = centred.square_().sum(0).double() - mean.double().square() * len(chunk)
                self._add(mean.double() + shift.double(), m2.clamp_min_(0), len(chunk))

    def to(self, device: torch.device | str) -> "ChannelStatistics":
        """Returns the statistics on `device`."""
        least, most, mean, m2 = (getattr(self, field).to(device) for field in _FIELDS)
        return ChannelStatistics(least, most, mean, m2, self.count)

    def merge(self, other: "ChannelStatistics") -> None:
        """Adds the tokens that `other` has seen."""
        self.min = torch.minimum(self.min, other.min)
        self.max = torch.maximum(self.max, other.max)
        self._add(other.mean, other.m2, other.count)

    def merged(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Returns these statistics, to which the tokens that `other` has seen have been added."""
        self.merge(other)
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """Returns all figures by name; the count is int64 of no dimension."""
        return {field: getattr(self, field) for field in _FIELDS} | {"count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "ChannelStatistics":
        """Returns the statistics whose `state` this is."""
        return cls(state["min"], state["max"], state["mean"], state["m2"], int(state["count"]))

    def divided(self, scale: torch.Tensor) -> "ChannelStatistics":
        """Returns the statistics of the same tokens with channel j divided by ``scale[j]`` > 0, exactly (to rounding)."""
        scale = scale.to(self.min.device)
        wide = scale.double()
        return ChannelStatistics(
            self.min / scale, self.max / scale, self.mean / wide, self.m2 / wide.square(), self.count
        )

    def reordered(self, order: torch.Tensor) -> "ChannelStatistics":
        """Returns the statistics of the same tokens with their channels in the order `order`, int64 (channels,)."""
        order = order.to(self.min.device)
        return ChannelStatistics(self.min[order], self.max[order], self.mean[order], self.m2[order], self.count)

    def is_finite(self) -> torch.Tensor:
        """Returns a bool tensor (no wait for the device): whether everything seen was finite."""
        return torch.isfinite(self.min).all() & torch.isfinite(self.max).all() & torch.isfinite(self.mean).all()

    def _add(self, mean: torch.Tensor, m2: torch.Tensor, count: int) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total


@dataclass(frozen=True)
class WeightStatistics:
    """A weight's min, max and std per input channel (in,) and per output channel (out,), float32."""

    in_min: torch.Tensor
    in_max: torch.Tensor
    in_std: torch.Tensor
    out_min: torch.Tensor
    out_max: torch.Tensor
    out_std: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> "WeightStatistics":
        """Takes the statistics of a weight (out, in).

        In pieces of `CHUNK_ROWS` rows, by sums of squared distances: torch's std is some forty times slower on CPU.
        """
        columns = ChannelStatistics.empty(weight.shape[1], weight.device)
        rows: list[tuple[torch.Tensor, ...]] = []
        for chunk in weight.detach().split(CHUNK_ROWS):
            columns.update(chunk)
            wide = chunk.float()
            spread = (wide - wide.mean(1, keepdim=True)).square_().mean(1).sqrt_()
            rows.append((wide.amin(1), wide.amax(1), spread))
        ends = (torch.cat(figures) for figures in zip(*rows, strict=True))
        return cls(columns.min, columns.max, columns.std.float(), *ends)

    def to(self, device: torch.device | str) -> "WeightStatistics":
        """Returns the statistics on `device`."""
        return WeightStatistics(*(getattr(self, field).to(device) for field in _WEIGHT_FIELDS))

    def reordered_inputs(self, order: torch.Tensor) -> "WeightStatistics":
        """Returns the statistics of the weight with its columns in the order `order`, int64 (in,)."""
        order = order.to(self.in_min.device)
        return dataclasses.replace(
            self, in_min=self.in_min[order], in_max=self.in_max[order], in_std=self.in_std[order]
        )

    def reordered_outputs(self, order: torch.Tensor) -> "WeightStatistics":
        """Returns the statistics of the weight with its rows in the order `order`, int64 (out,)."""
        order = order.to(self.out_min.device)
        return dataclasses.replace(
            self, out_min=self.out_min[order], out_max=self.out_max[order], out_std=self.out_std[order]
        )


@dataclass(frozen=True)
class Provenance:
    """What statistics were taken from, and by what."""

    model: str
    revision: str | None
    weight_fingerprint: str
    data_fingerprint: str
    data_source: str
    samples: int
    length: int
    dtype: str
    version: str


UNDER_WAY = Provenance("", None, "", "", "", 0, 0, "", "")
"""Of statistics of one block, which are part of a pass that is under way."""


@dataclass
class Statistics:
    """Statistics of every Linear by full name: of its input, where a token reached it, and of its weight."""

    inputs: dict[str, ChannelStatistics]
    weights: dict[str, WeightStatistics]
    provenance: Provenance

    @property
    def unreached(self) -> list[str]:
        """The Linears that no token reached: they have no input statistics, and nothing can be fitted to their inputs."""
        return [name for name in self.weights if name not in self.inputs]

    def to(self, device: torch.device | str) -> "Statistics":
        """Returns the statistics on `device`."""
        inputs = {name: statistics.to(device) for name, statistics in self.inputs.items()}
        weights = {name: statistics.to(device) for name, statistics in self.weights.items()}
        return Statistics(inputs, weights, self.provenance)

    def of_linears(self, names: Iterable[str]) -> "Statistics":
        """Returns the statistics of these Linears alone, the same objects; of inputs where a token reached them."""
        wanted = list(names)
        reached = {name: self.inputs[name] for name in wanted if name in self.inputs}
        return Statistics(reached, {name: self.weights[name] for name in wanted}, self.provenance)

    def copy(self) -> "Statistics":
        """Returns statistics whose entries can be replaced without touching these."""
        return Statistics(dict(self.inputs), dict(self.weights), self.provenance)

    def merge(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both runs' tokens together. Raises `UserError` when the models differ."""
        mine, theirs = self.provenance, other.provenance
        if mine.weight_fingerprint != theirs.weight_fingerprint or self.weights.keys() != other.weights.keys():
            raise UserError(f"statistics of {mine.model} and of {theirs.model} cannot be merged: their weights differ")
        inputs = {name: dataclasses.replace(statistics) for name, statistics in self.inputs.items()}
        for name, statistics in other.inputs.items():
            if name in inputs:
                inputs[name].merge(statistics)
            else:
                inputs[name] = dataclasses.replace(statistics)
        provenance = dataclasses.replace(
            mine,
            data_fingerprint=f"{mine.data_fingerprint}+{theirs.data_fingerprint}",
            data_source=f"{mine.data_source}+{theirs.data_source}",
            samples=mine.samples + theirs.samples,
        )
        return Statistics(inputs, self.weights, provenance)

    def check_fits(self, weight_fingerprint: str, linears: Mapping[str, tuple[int, int]]) -> None:
        """Raises `UserError` with the reason when these are not statistics of the model with `linears` (out, in)."""
        self.check_linears(linears)
        p = self.provenance
        if p.weight_fingerprint != weight_fingerprint:
            raise UserError(
                f"calibration.statistics: taken from other weights ({p.model}, {p.weight_fingerprint[:12]}): take them again"
            )

    def check_linears(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Raises `UserError` when these are not statistics of the Linears with these shapes (out, in), of each and no other."""
        p = self.provenance
        missing = [name for name in linears if name not in self.weights]
        if missing:
            raise UserError(
                f"calibration.statistics: taken from {p.model}, which has no {missing[0]}: take them from this model"
            )
        for name, (_, columns) in linears.items():
            seen = len(self.weights[name].in_min)
            if seen != columns:
                raise UserError(
                    f"calibration.statistics: {name} has {seen} channels in {p.model}, {columns} here: take them again"
                )
        other = [name for name in self.weights if name not in linears]
        if other:
            raise UserError(
                f"calibration.statistics: taken from {p.model}, whose {other[0]:.80} this model has not: take them from this model"
            )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Returns all figures by name, as a file holds them."""
        tensors: dict[str, torch.Tensor] = {}
        for name, s in self.inputs.items():
            tensors |= {f"{name}/input/{f}": getattr(s, f).contiguous() for f in _FIELDS}
            tensors[f"{name}/input/count"] = torch.tensor(s.count)
        for name, w in self.weights.items():
            tensors |= {f"{name}/weight/{f}": getattr(w, f).contiguous() for f in _WEIGHT_FIELDS}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], provenance: Provenance) -> "Statistics":
        """Returns the statistics whose `to_tensors` gave these."""
        return _assemble(tensors, provenance)

    def save(self, path: pathlib.Path) -> None:
        """Writes a safetensors file with the provenance in its metadata; an old file of that name stays whole on failure."""
        tensors = self.to_tensors()
        unshared = {key: value.clone() for key, value in tensors.items()}
        metadata = {
            "kind": FILE_KIND,
            "provenance": json.dumps(dataclasses.asdict(self.provenance)),
            "digest": _digest(tensors),
        }
        write_atomic(path, lambda temporary: save_file(unshared, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: pathlib.Path, device: torch.device | str = "cpu") -> "Statistics":
        """Reads a file that `save` wrote, to `device`. Raises `UserError` when it is missing, cut short, or something else."""
        if not path.is_file():
            raise UserError(f"calibration.statistics: {path} is not there: write it with gen_act_stat.py, or use null")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                if metadata.get("kind") != FILE_KIND:
                    raise UserError(
                        f"calibration.statistics: {path} holds no statistics: write it with gen_act_stat.py"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"calibration.statistics: {path} is cut short or damaged ({error}): take the statistics again"
            ) from None
        try:
            found = _assemble(tensors, _provenance(metadata.get("provenance")))
            if metadata.get("digest") != _digest(tensors):
                raise ValueError("its figures are not those that were written")
            return found.to(device)
        except ValueError as error:
            raise UserError(f"calibration.statistics: {path} is damaged ({error}): take the statistics again") from None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 over all figures and their names: entries that change places are not the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _provenance(text: str | None) -> Provenance:
    """Returns what `text`, JSON, says. Raises ValueError for anything but the fields of `Provenance`."""
    try:
        found = Provenance(**parse_json(text or ""))
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its provenance is not what gen_act_stat.py writes") from None
    for field in dataclasses.fields(Provenance):
        value = getattr(found, field.name)
        kinds = (
            (int,) if field.name in {"samples", "length"} else (str, type(None)) if field.name == "revision" else (str,)
        )
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"its provenance has {field.name} {value!r:.80}")
    return found


def _assemble(tensors: dict[str, torch.Tensor], provenance: Provenance) -> Statistics:
    """Returns the statistics that the tensors of a file are. Raises ValueError with the reason when they are none."""
    tensors = dict(tensors)
    names = list(dict.fromkeys(key.rsplit("/", 2)[0] for key in tensors))
    inputs, weights = {}, {}
    for name in names:
        parts = {key: tensors.pop(f"{name}/{key}", None) for key in _KEYS}
        seen = [parts[key] for key in _KEYS if key.startswith("input/")]
        whole = [value for key, value in parts.items() if value is not None and key.startswith("weight/")]
        given = [value for value in seen if value is not None]
        if len(whole) < len(_WEIGHT_FIELDS) or 0 < len(given) < len(seen):
            raise ValueError(f"{name} lacks figures")
        weights[name] = WeightStatistics(*whole)
        if given:
            least, most, mean, m2, count = given
            inputs[name] = ChannelStatistics(least, most, mean, m2, _count(name, count))
        _check_figures(name, inputs.get(name), weights[name])
    if tensors:
        raise ValueError(f"{next(iter(tensors))!r:.80} is no figure of a Linear")
    return Statistics(inputs, weights, provenance)


def _count(name: str, count: torch.Tensor) -> int:
    if count.dtype != torch.int64 or count.numel() != 1 or int(count) < 1:
        raise ValueError(f"{name} counts no tokens")
    return int(count)


def _check_figures(name: str, inputs: ChannelStatistics | None, weights: WeightStatistics) -> None:
    """Raises ValueError unless the figures are finite, in order, and of one Linear."""
    columns, rows = len(weights.in_min.reshape(-1)), len(weights.out_min.reshape(-1))
    kinds = {"mean": torch.float64, "m2": torch.float64}
    figures = [(getattr(weights, f), columns if f.startswith("in_") else rows, torch.float32) for f in _WEIGHT_FIELDS]
    ends = [(weights.in_min, weights.in_max), (weights.out_min, weights.out_max)]
    spreads = [weights.in_std, weights.out_std]
    if inputs is not None:
        figures += [(getattr(inputs, f), columns, kinds.get(f, torch.float32)) for f in _FIELDS]
        ends, spreads = [*ends, (inputs.min, inputs.max)], [*spreads, inputs.m2]
    for tensor, length, dtype in figures:
        if tensor.shape != (length,) or tensor.dtype != dtype or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has figures of another shape or type, or NaN or inf")
    if any(bool((low > high).any()) for low, high in ends) or any(bool((s < 0).any()) for s in spreads):
        raise ValueError(f"{name} has a least value above the greatest, or a spread below 0")
    if inputs is not None:
        slack = 1e-5 * inputs.absmax + torch.finfo(torch.float32).tiny  # what rounding may carry a mean beyond the ends
        if bool(((inputs.mean < inputs.min - slack) | (inputs.mean > inputs.max + slack)).any()):
            raise ValueError(f"{name} has a mean outside its least and greatest value")
