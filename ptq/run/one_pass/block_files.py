"""How finished blocks lie on the disk: with all that is needed to build them again, or as shards of the run's export."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from ptq.config.schema import SchemeConfig
from ptq.export.base import BlockShards
from ptq.export.packing.shards import write_block as write_shard
from ptq.export.quantized_tensors import LinearTensors, refuse_foreign, tensors_of
from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json
from ptq.network.network import Block, Network
from ptq.run.exports import origin_of
from ptq.run.kept.block_file import read_figures, write_block
from ptq.run.session import Session


class WholeBlocks:
    """Blocks with codes, scales and descriptions, their figures in the file's header."""

    def write(self, block: Block, path: pathlib.Path, figures: Mapping[str, Any]) -> None:
        """Writes the block."""
        write_block(block, path, figures)

    def read(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the figures."""
        return read_figures(path)


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
        found: dict[str, Any] = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        return found


class HeldSource:
    """A quantized model of which a block at a time is in memory, and what lies outside the blocks when it is asked for."""

    def __init__(self, session: Session):
        self.network: Network = session.network
        self.tokenizer: Any = session.loaded.tokenizer
        self.scheme: SchemeConfig = session.recipe.scheme
        self.origin = origin_of(session)
        self._weights = session.loaded.weights

    def linear(self, name: str) -> LinearTensors:
        """Returns the tensors of the Linear `name`: the module's own, no copies."""
        return tensors_of(name, self.network.model.get_submodule(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the parameter or buffer `name`."""
        owner, _, last = name.rpartition(".")
        with self._weights.hold([owner]):
            value: torch.Tensor = getattr(self.network.model.get_submodule(owner), last)
            return value
