"""What an exporter is: it says what its format can express before the work, and writes the quantized model after it."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ptq.config.schema import SchemeConfig
from ptq.config.scheme import LinearSpecs, attention_tensors, linear_specs, tensor_specs
from ptq.errors import UserError
from ptq.export.quantized_tensors import QuantizedTensors
from ptq.network.network import Block, Network
from quantize.spec.formats import INTEGER
from quantize.spec.quant_spec import QuantSpec
from quantize.spec.rules import OUTSIDE


@dataclass(frozen=True)
class Exported:
    """What was written: the file or folder, its bytes, and sentences on what the format keeps differently."""

    path: pathlib.Path
    bytes: int
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Writes a quantized model in one format. Beside it in its module stands a dataclass `Options`."""

    filename: str

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme` with the details that the format fixes (the type of a scale, the range of a code) filled in."""

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Raises `UserError`, naming the field and the nearest expressible value, for what the format cannot express.

        Needs no weights: works on a model on the meta device.

        Returns:
            Sentences on what a runtime will compute otherwise than the simulation, to be said before the work.
        """

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the model to `path`, whole or not at all; what was there is replaced."""


@dataclass(frozen=True)
class BlockShards:
    """Writes a folder of shards a finished block at a time: what a run keeps of a block is a shard of its export.

    Attributes:
        tensors: gives names and values of what the format holds of a block, which is in memory as it is quantized.
        finish: writes the folder from the blocks' files, in order, which are linked into it, and all that lies outside them.
    """

    tensors: Callable[[Block], Iterator[tuple[str, torch.Tensor]]]
    finish: Callable[[pathlib.Path, Sequence[pathlib.Path]], Exported]


@runtime_checkable
class ShardedExporter(Protocol):
    """An exporter whose folder can be written a block at a time."""

    def block_shards(self, source: QuantizedTensors) -> BlockShards:
        """Returns what writes it. Of `source` each block is read when its turn comes, what lies outside them at the end."""


class GrowingFile(Protocol):
    """One file that is written a finished block at a time, each at its place in it: what a run keeps of its blocks is the export."""

    def append(self, block: Block, file: pathlib.Path) -> dict[str, Any]:
        """Writes what the format holds of the block, which is in memory as it is quantized, behind the blocks before it.

        Returns:
            What `take_up` has to know, as JSON holds it: ``start`` and ``end`` are where the block's bytes lie.
        """

    def take_up(self, part: Mapping[str, Any]) -> None:
        """Takes a block that is in the file for written; `part` is what `append` gave."""

    def finish(self, path: pathlib.Path, file: pathlib.Path) -> Exported:
        """Writes what is missing beside the blocks, and gives the file the name `path` as well."""


@runtime_checkable
class GrowingExporter(Protocol):
    """An exporter whose one file can be written a block at a time."""

    def growing_file(self, source: QuantizedTensors) -> GrowingFile:
        """Returns what writes it. Of `source` each block is read when its turn comes, what lies outside them when it is asked for."""


@runtime_checkable
class CorrectedExporter(Protocol):
    """An exporter that holds a product of low rank beside a quantized weight (`QuantizedTensors.correction`)."""

    corrected_as: str
    """What becomes of it there: an adapter of which library."""

    def check_corrections(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Raises `UserError`, naming the field, where the weights that the scheme quantizes cannot all have one there. Needs no weights.

        Returns:
            Sentences to be said before the work.
        """


def specs_by_linear(scheme: SchemeConfig, network: Network) -> dict[str, LinearSpecs]:
    """Returns the weight and input specs of every Linear of the blocks by full name."""
    return {name: linear_specs(scheme, name) for name in network.linears}


def refuse_attention(scheme: SchemeConfig, format_name: str, nearest: str) -> None:
    """Raises `UserError` when the scheme quantizes query, key, value or attention probabilities: `format_name` keeps them."""
    found = sorted(attention_tensors(scheme))
    if found:
        fields = ", ".join(f"scheme.{tensor}" for tensor in found)
        raise UserError(f"{fields}: quantized, but {format_name} has no field for it: use {nearest}, or export=null")


def refuse_outside(scheme: SchemeConfig, format_name: str, tensors: Sequence[str] = OUTSIDE) -> None:
    """Raises `UserError` when the scheme quantizes one of `tensors` (embedding, head), for which `format_name` has no place."""
    for tensor in tensors:
        if getattr(scheme, tensor) is not None:
            raise UserError(
                f"scheme.{tensor}: quantized, but {format_name} has no place for its format: use null, or export=null"
            )


def require(spec: QuantSpec, path: str, name: str, format_name: str, nearest: str, **allowed: tuple[Any, ...]) -> None:
    """Raises `UserError` when a field of `spec` has a value that the format does not express.

    Args:
        spec: the format of one tensor.
        path: its place in the recipe, such as ``scheme.weight``.
        name: the Linear that it belongs to.
        format_name: the exporter.
        nearest: the nearest expressible scheme, from `advice`.
        allowed: the expressible values of each field; ``format`` is int unless it is given.
    """
    for field, values in {"format": (INTEGER,), **allowed}.items():
        value = getattr(spec, field)
        if value not in values:
            raise UserError(f"{path}.{field}: {value!r} of {name} cannot be exported to {format_name}: use {nearest}")


def advice(overrides: str, weight: str, inputs: str | None) -> str:
    """Returns a scheme to use in both spellings: overrides of the command line, and what a recipe of one's own says.

    Args:
        overrides: such as ``scheme=w8a8``.
        weight: the fields of its weight, in YAML.
        inputs: those of its input, or None where it is not quantized.
    """
    return f"{overrides} (weight {{{weight}}}, input {'null' if inputs is None else f'{{{inputs}}}'})"


def most_weight_bits(scheme: SchemeConfig) -> int:
    """Returns the bits of the widest weight in the scheme, its overrides included; 8 where no weight is quantized."""
    return max((spec.bits for spec in tensor_specs(scheme, "weight")), default=8)


def quantizes_inputs(scheme: SchemeConfig) -> bool:
    """Whether the scheme quantizes the input of some Linear."""
    return bool(tensor_specs(scheme, "input"))


def refuse_existing(path: pathlib.Path, force: bool) -> None:
    """Raises `UserError` when `path` is taken and `force` is not given."""
    if path.exists() and not force:
        raise UserError(f"--output: {path} exists: add --force to replace it, or name another path")
