"""Folders of safetensors shards with an index, as transformers and vLLM read them: written whole, or a finished block at a time."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import save_file

from ptq.files.atomic import linked, write_text
from ptq.files.safetensors_file import read_header, write_as_they_come

SHARD_BYTES = 25_000_000
"""What a shard holds at most (one larger tensor has a shard of its own): bounds the memory of an export."""
PIECE = 1 << 20
"""Values that are tried in 16 bits at once."""
TENSORS = 5
"""As many as a format has of a Linear at most, its bias among them."""
METADATA = {"format": "pt"}
"""What transformers expects in the header of a shard."""


def lossless(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a float tensor in 16 bits where that loses nothing, else as it is; weights were rounded to 16 bits before."""
    tensor = tensor.detach()
    if tensor.dtype == torch.float32:
        # Piece by piece: an embedding in three types at once would be most of an export's memory.
        pieces = tensor.reshape(-1).split(PIECE)
        for dtype in (torch.float16, torch.bfloat16):
            if all(torch.equal(piece.to(dtype).float(), piece) for piece in pieces):
                return tensor.to(dtype).contiguous()
    return tensor.contiguous()


def write_shards(
    folder: pathlib.Path, tensors: Iterator[tuple[str, torch.Tensor]], finished: Sequence[pathlib.Path] = ()
) -> None:
    """Writes ``model.safetensors``, or shards with an index where there is more than one shard's worth.

    Args:
        folder: where to.
        tensors: names and values of all that is to be written.
        finished: shards that are written already: they come first, and the folder gets a link to each of them, or a copy where
            the file system has no links.
    """
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    total, held = 0, 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f"part-{len(names)}", metadata=METADATA)
            names.append(list(shard))
            shard.clear()

    for file in finished:
        header = read_header(file)
        linked(file, folder / f"part-{len(names)}")
        names.append(list(header))
        total += sum(stored.end - stored.start for stored in header.values())
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held + size > SHARD_BYTES:
            flush()
            held = 0
        # On the CPU already, or copied there: a shard at a time.
        shard[name] = tensor.cpu()
        held, total = held + size, total + size
    flush()
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(names):
        shard_name = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / shard_name)
        weight_map |= dict.fromkeys(part, shard_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def write_block(path: pathlib.Path, tensors: Iterator[tuple[str, torch.Tensor]], modules: int) -> None:
    """Writes the tensors of one block of so many `modules` as a shard, one in memory at a time."""
    write_as_they_come(path, tensors, TENSORS * modules, METADATA)
