"""How finished blocks lie on the disk: with all that is needed to build them again, or as what the run's export holds of them."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ptq.config.schema import Recipe, SchemeConfig
from ptq.export.base import BlockShards, Exported, GrowingExporter, GrowingFile, ShardedExporter
from ptq.export.packing.shards import write_block as write_shard
from ptq.export.quantized_tensors import LinearTensors, narrowed, refuse_foreign, tensors_of
from ptq.export.registry import build_exporter
from ptq.files.atomic import write_atomic, write_text, writing_failed
from ptq.files.bounded import parse_json
from ptq.network.network import Block, Network
from ptq.run.exports import corrects, origin_of
from ptq.run.kept.block_file import read_figures, write_block
from ptq.run.kept.kept_pass import sum_of_file
from ptq.run.kept.outside_file import stored_type
from ptq.run.session import Session
from ptq.steps._step import Step
from quantize.solvers.lowrank import Factors


class WholeBlocks:
    """Blocks with codes, scales and descriptions, their figures in the file's header."""

    def write(self, block: Block, path: pathlib.Path, figures: Mapping[str, Any]) -> None:
        """Writes the block."""
        write_block(block, path, figures)

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures."""
        return self.figures(path)

    @staticmethod
    def figures(path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures, and takes nothing up."""
        return read_figures(path)

    def sum_of(self, path: pathlib.Path) -> int:
        """Returns a sum of the block's bytes."""
        return sum_of_file(path)


class Shards:
    """Blocks as the export holds them, packed; their figures in a file beside each, so that the shard is the export's own."""

    def __init__(self, shards: BlockShards):
        self._shards = shards

    def write(self, block: Block, path: pathlib.Path, figures: Mapping[str, Any]) -> None:
        """Writes the block.

        Raises:
            UserError: where a step has put something into it that the format has no place for.
        """
        refuse_foreign(block)
        write_text(path.with_suffix(".json"), json.dumps(figures))
        write_shard(path, self._shards.tensors(block), sum(1 for _ in block.module.modules()))

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures."""
        return self.figures(path)

    @staticmethod
    def figures(path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures, and takes nothing up."""
        found: dict[str, Any] = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        return found

    def sum_of(self, path: pathlib.Path) -> int:
        """Returns a sum of the block's bytes."""
        return sum_of_file(path)

    def finish(self, path: pathlib.Path, blocks: Sequence[pathlib.Path]) -> Exported:
        """Makes the export of the finished blocks' files."""
        return self._shards.finish(path, blocks)


class Growing:
    """Blocks one behind another in one file, which is the export's; a file of each has its figures and where it lies, no tensors."""

    NAME = "export.part"

    def __init__(self, export: GrowingFile):
        self._export = export

    def write(self, block: Block, path: pathlib.Path, figures: Mapping[str, Any]) -> None:
        """Writes the block.

        Raises:
            UserError: where a step has put something into it that the format has no place for, or the disk is full.
        """
        refuse_foreign(block)
        file = path.with_name(self.NAME)
        try:
            part = self._export.append(block, file)
        except OSError as error:
            raise writing_failed(file, error) from None
        metadata = {"kind": "finished block", "figures": json.dumps({**figures, "part": part})}
        write_atomic(path, lambda temporary: save_file({}, temporary, metadata=metadata))

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures, and takes the block up."""
        figures = self.figures(path)
        self._export.take_up(figures["part"])
        return figures

    def sum_of(self, path: pathlib.Path) -> int:
        """Returns a sum of the block's bytes."""
        part = self.figures(path)["part"]
        return sum_of_file(path) + sum_of_file(path.with_name(self.NAME), part["start"], part["end"])

    def finish(self, path: pathlib.Path, blocks: Sequence[pathlib.Path]) -> Exported:
        """Makes the export of the finished blocks' files."""
        return self._export.finish(path, blocks[0].with_name(self.NAME))

    @staticmethod
    def figures(path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures, and takes nothing up."""
        try:
            return read_figures(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def keeps_export(recipe: Recipe, steps: Mapping[str, Step]) -> bool:
    """Whether what a run in one pass keeps of finished blocks is its export's: one that can be, and no codes are asked for.

    Corrections of low rank lie beside the model's own tensors, and so beside no block's: these are kept with their codes.
    """
    if recipe.export is None or recipe.execution.save or corrects(steps) is not None:
        return False
    return isinstance(build_exporter(recipe.export), ShardedExporter | GrowingExporter)


def figures_read(recipe: Recipe, steps: Mapping[str, Step]) -> Callable[[pathlib.Path], dict[str, Any]]:
    """Returns what reads the figures of blocks that a run of these `steps` has finished."""
    exporter = _kept_as(recipe, steps)
    if isinstance(exporter, ShardedExporter):
        return Shards.figures
    return WholeBlocks.figures if exporter is None else Growing.figures


def files_of(session: Session, steps: Mapping[str, Step]) -> WholeBlocks | Shards | Growing:
    """Returns how the session's finished blocks, which `steps` make, are kept; what lies outside them is in memory as these leave it."""
    exporter, source = _kept_as(session.recipe, steps), HeldSource(session, stored_type(session.loaded, steps))
    if isinstance(exporter, ShardedExporter):
        return Shards(exporter.block_shards(source))
    return WholeBlocks() if exporter is None else Growing(exporter.growing_file(source))


def _kept_as(recipe: Recipe, steps: Mapping[str, Step]) -> ShardedExporter | GrowingExporter | None:
    """Returns the exporter whose format finished blocks are kept in; None where they are kept with their codes."""
    exporter = build_exporter(recipe.export) if recipe.export is not None and keeps_export(recipe, steps) else None
    return exporter if isinstance(exporter, ShardedExporter | GrowingExporter) else None


class HeldSource:
    """A quantized model of which a block at a time is in memory, and what lies outside the blocks when it is asked for.

    Args:
        session: the run's.
        narrow: the type that matrices outside the blocks are rounded to; None for none.
    """

    def __init__(self, session: Session, narrow: torch.dtype | None):
        self.network: Network = session.network
        self.tokenizer: Any = session.loaded.tokenizer
        self.scheme: SchemeConfig = session.recipe.scheme
        self.origin = origin_of(session)
        self._weights, self._narrow = session.loaded.weights, narrow
        self._outside = frozenset(self.network.outside)

    def linear(self, name: str) -> LinearTensors:
        """Returns the tensors of the Linear `name`: the module's own, no copies."""
        return tensors_of(name, self.network.model.get_submodule(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the parameter or buffer `name`."""
        owner, _, last = name.rpartition(".")
        with self._weights.hold([owner]):
            value: torch.Tensor = getattr(self.network.model.get_submodule(owner), last)
            return narrowed(value, self._narrow) if owner in self._outside else value

    def correction(self, name: str) -> Factors | None:
        """Returns None: a block that has one is not kept this way (`keeps_export`)."""
        return None
