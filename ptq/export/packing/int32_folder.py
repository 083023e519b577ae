"""A folder whose quantized Linears all have one width and one group size: what GPTQ's and AWQ's checkpoints have in common."""

import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ptq.config.schema import SchemeConfig
from ptq.config.scheme import LinearSpecs, with_weights
from ptq.errors import UserError
from ptq.export.base import BlockShards, Exported, advice, refuse_attention, refuse_outside, require, specs_by_linear
from ptq.export.packing.shards import lossless, write_shards
from ptq.export.quantized_tensors import LinearTensors, QuantizedTensors, rounded, walked
from ptq.files.atomic import write_folder_atomic
from ptq.network.experts.published_names import published_names
from ptq.network.network import Network
from ptq.network.outside import OutsideWeight, outside_weights
from quantize.kernels.matmul import is_plain
from quantize.spec.quant_spec import QuantSpec

Write = Callable[[LinearTensors], Mapping[str, torch.Tensor]]
"""Gives the tensors of one quantized Linear by their last names."""


def with_fp16_scales(scheme: SchemeConfig) -> SchemeConfig:
    """Returns `scheme` with weights whose scales are exact in fp16, as both formats store them."""

    def half(spec: QuantSpec | None) -> QuantSpec | None:
        return replace(spec, scales="float16") if spec is not None and spec.affine else spec

    return with_weights(scheme, half)


def check(
    scheme: SchemeConfig, network: Network, name: str, allowed: dict[str, tuple[Any, ...]], example: str, heads: bool
) -> None:
    """Raises `UserError` for what such a folder cannot hold.

    Args:
        scheme: of the model.
        network: the model.
        name: of the format.
        allowed: values of a weight's fields.
        example: a shipped scheme that can be held, and the fields of its weight, after a blank.
        heads: whether a head that is not tied to the embedding can be held, in the Linears' format.
    """
    shipped, _, fields = example.partition(" ")
    nearest = advice(f"scheme={shipped}", fields, None)
    refuse_attention(scheme, name, nearest)
    refuse_outside(scheme, name, ("embedding",) if heads else ("embedding", "head"))
    specs = specs_by_linear(scheme, network)
    found: dict[str, LinearSpecs] = {owner: s for owner, s in specs.items() if s.any}
    if not found:
        raise UserError(f"scheme: nothing is quantized, so {name} has nothing to hold: use {nearest}")
    first = next(iter(found.values())).weight
    for owner, spec in found.items():
        if spec.input is not None:
            raise UserError(f"scheme.input: quantized for {owner}, but {name} holds weights only: use {nearest}")
        if spec.weight is None:
            continue
        require(spec.weight, "scheme.weight", owner, name, nearest, **allowed)
        if not is_plain(network.linears[owner]):
            kind = type(network.linears[owner]).__name__
            raise UserError(
                f"export: {name} holds torch's own Linears, and {owner} is a {kind}: exclude it (scheme.exclude)"
            )
        if first is not None and _told(spec.weight) != _told(first):
            raise UserError(
                f"scheme.overrides: {owner} has another format than the first Linear, and {name} has one for all: use {nearest}"
            )
        _check_words(spec.weight, network.shapes[owner], f"scheme.weight: {owner}", name, "exclude it (scheme.exclude)")
    if (head := _head(scheme, network)) is not None and head.spec is not None:
        require(head.spec, "scheme.head", head.name, name, nearest, **allowed)
        if first is None or _told(head.spec) != _told(first):
            raise UserError(
                f"scheme.head: another format than scheme.weight, and {name} has one for all: give both the same"
            )
        _check_words(head.spec, head.shape, f"scheme.head: {head.name}", name, "use null")


def _check_words(spec: QuantSpec, shape: tuple[int, int], what: str, name: str, instead: str) -> None:
    """Raises `UserError` for a weight (out, in) that does not fill whole words."""
    rows, columns = shape
    lanes = 32 // spec.bits
    if rows % lanes or columns % lanes:
        raise UserError(f"{what} is {rows} x {columns}, and {name} packs {lanes} codes a word: {instead}")


def _head(scheme: SchemeConfig, network: Network) -> OutsideWeight | None:
    """Returns the head's weight where the scheme gives it a format."""
    return next((w for w in outside_weights(scheme, network) if w.tensor == "head" and w.spec is not None), None)


def _told(spec: QuantSpec) -> tuple[Any, ...]:
    return spec.bits, spec.symmetric, spec.granularity, spec.group_size


def write(
    source: QuantizedTensors,
    path: pathlib.Path,
    linear: Write,
    words: Callable[[QuantSpec, list[str]], dict[str, Any]],
    finished: Sequence[pathlib.Path] = (),
) -> Exported:
    """Writes the folder: safetensors, config.json with the format's own ``quantization_config``, the tokenizer's files.

    Args:
        source: the model.
        path: of the folder.
        linear: see `Write`.
        words: gives the ``quantization_config`` of the weights' format and the names of Linears that are not quantized.
        finished: shards that hold the blocks, one each; none where they are to be written too.
    """
    specs, model = specs_by_linear(source.scheme, source.network), source.network.model
    spec = next(s.weight for s in specs.values() if s.weight is not None)
    left = sorted(name for name, s in specs.items() if not s.any)

    def fill(folder: pathlib.Path) -> None:
        without = [block.name for block in source.network.blocks] if finished else []
        tensors = _tensors(source, linear, published_names(source.network), without=without)
        write_shards(folder, tensors, finished)
        saved = type(model.config).from_dict(model.config.to_dict())
        saved.architectures, saved.use_cache = [type(model).__name__], True
        # The kernels of both formats compute in fp16.
        described = words(spec, left) | ({} if _head(source.scheme, source.network) is None else {"lm_head": True})
        saved.dtype, saved.quantization_config = torch.float16, described
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved.save_pretrained(folder)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)

    write_folder_atomic(path, fill)
    return Exported(path, sum(file.stat().st_size for file in path.iterdir()))


class FolderExporter:
    """Writes such a folder: safetensors, config.json, the tokenizer's files. A format says how it packs, and what it allows."""

    filename = ""
    name: ClassVar[str]
    allowed: ClassVar[dict[str, tuple[Any, ...]]]
    """Values of a weight's fields."""
    example: ClassVar[str]
    """A shipped scheme that can be held, and the fields of its weight, after a blank."""
    heads: ClassVar[bool] = False
    """Whether it can hold a quantized head."""

    def __init__(self, options: Any):
        self.options = options

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme` with scales that are exact in fp16."""
        return with_fp16_scales(scheme)

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses other formats, and more than one."""
        check(scheme, network, self.name, self.allowed, self.example, self.heads)
        return ()

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the folder, a shard in memory at a time."""
        self.check(source.scheme, source.network)
        return write(source, path, self.packed, self.quantization_config)

    def block_shards(self, source: QuantizedTensors) -> BlockShards:
        """Returns what writes the folder a finished block at a time."""
        self.check(source.scheme, source.network)
        published = published_names(source.network)

        def finish(path: pathlib.Path, files: Sequence[pathlib.Path]) -> Exported:
            return write(source, path, self.packed, self.quantization_config, files)

        return BlockShards(lambda block: _tensors(source, self.packed, published, [block.name]), finish)

    def packed(self, tensors: LinearTensors) -> Mapping[str, torch.Tensor]:
        """Returns the tensors of one quantized Linear by their last names."""
        raise TypeError(f"{type(self).__name__} does not say how a Linear is packed")

    def quantization_config(self, spec: QuantSpec, left: list[str]) -> dict[str, Any]:
        """Returns the ``quantization_config`` of the weights' format and the names of Linears that are not quantized."""
        raise TypeError(f"{type(self).__name__} does not say how its weights are described")


def _tensors(
    source: QuantizedTensors,
    linear: Write,
    published: Mapping[str, str],
    within: Sequence[str] = ("",),
    without: Sequence[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of the checkpoint as `walked` does, under its `published` name."""
    head = _head(source.scheme, source.network)
    for owner, is_linear in walked(source, within, without):
        if head is not None and head.spec is not None and owner == f"{head.name}.weight":
            parts = linear(rounded(head.name, source.tensor(owner), head.spec))
            yield from ((f"{head.name}.{last}", lossless(value)) for last, value in parts.items())
            continue
        if not is_linear:
            yield published.get(owner, owner), lossless(source.tensor(owner))
            continue
        found = source.linear(owner)
        name = published.get(f"{owner}.weight", f"{owner}.weight").removesuffix(".weight")
        parts = {"weight": torch.as_tensor(found.weight)} if found.spec is None else linear(found)
        yield from ((f"{name}.{last}", lossless(value)) for last, value in parts.items())
        if found.bias is not None:
            yield f"{name}.bias", lossless(found.bias)


def unsigned(tensors: LinearTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes of 0 to 2^bits - 1 (out, in), and scales fp16 and zero points, both (out, groups), of a quantized Linear."""
    spec, codes = tensors.spec, tensors.codes
    if spec is None or codes is None:
        raise ValueError(f"{tensors.name} has no codes")
    scale = tensors.row_scales().expand(len(codes), -1)
    middle = 2 ** (spec.bits - 1) if spec.symmetric else 0
    zero = tensors.row_zero_points()
    points = torch.full_like(scale, middle) if zero is None else zero.expand(len(codes), -1)
    return codes.int() + middle, scale.half(), points.int()
