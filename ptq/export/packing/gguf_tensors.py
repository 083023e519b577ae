"""The tensors of a GGUF file: which there are, in the file's order, and each as the file holds it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import gguf
import numpy as np
import torch

from ptq.export.base import specs_by_linear
from ptq.export.llama_family import unpermuted
from ptq.export.packing.gguf_architectures import ARCHITECTURES, names_of, stacked_experts
from ptq.export.packing.gguf_blocks import blocks_of, type_of
from ptq.export.quantized_tensors import QuantizedTensors, rounded
from ptq.network.network import Network, is_inside
from ptq.network.outside import outside_weights, tied_parameters
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        name: GGUF's.
        shape: in elements; of a block format the last is in bytes.
        bytes: of the data.
        type: GGML's name of it.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    type: str

    @property
    def in_blocks(self) -> bool:
        """Whether `shape` ends in bytes."""
        return self.type not in {"F32", "F16", "BF16"}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Returns what `dataclasses.asdict` has made plain, and JSON has held."""
        return cls(**{**plain, "shape": tuple(plain["shape"])})


@dataclass(frozen=True)
class Entry:
    """A tensor that the file will hold, known without any value.

    Attributes:
        name: GGUF's.
        owner: full name of the module that has it, the first of several.
        last: name of the parameter in it.
        dims: of its shape.
        experts: full names of the Linears that the tensor holds together; none for others.
    """

    name: str
    owner: str
    last: str
    dims: int
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """One tensor as the file holds it: its values, and how far rounding scales to fp16 moved a weight at most."""

    info: TensorInfo
    values: np.ndarray
    moved: float = 0.0


class FileTensors:
    """Which tensors the file of a model holds, in its order, and each of them out of `source`, one in memory at a time."""

    def __init__(self, source: QuantizedTensors):
        network = source.network
        self._source, self._network = source, network
        self._architecture = ARCHITECTURES[network.model.config.model_type]
        self._specs = {name: s.weight for name, s in specs_by_linear(source.scheme, network).items()}
        self._outside = {w.name: w for w in outside_weights(source.scheme, network) if w.spec is not None}
        self._gates = {name for block in network.blocks for name in block.gates}
        self.before: list[Entry] = []
        """What comes before the blocks."""
        self.blocks: dict[str, list[Entry]] = {block.name: [] for block in network.blocks}
        """What each block holds, by its name."""
        self.after: list[Entry] = []
        """The rest."""
        for entry in _entries(network):
            name = next((name for name in self.blocks if entry.owner.startswith(f"{name}.")), None)
            outside = self.after if any(self.blocks.values()) else self.before
            (outside if name is None else self.blocks[name]).append(entry)

    def __iter__(self) -> Iterator[Entry]:
        """Yields them in the file's order."""
        yield from self.before
        for entries in self.blocks.values():
            yield from entries
        yield from self.after

    def made(self, entry: Entry) -> Made:
        """Returns the tensor, read now."""
        if entry.experts:
            return self._experts(entry)
        owner, last = entry.owner, entry.last
        heads = {
            "q_proj": self._network.model.config.num_attention_heads,
            "k_proj": self._network.model.config.num_key_value_heads,
        }
        linear = owner in self._specs
        interleaved = self._architecture.interleaved and linear
        turned = heads.get(owner.rpartition(".")[2]) if interleaved else None
        spec = self._specs.get(owner) if last == "weight" else None
        if last == "weight" and owner in self._outside:
            spec = self._outside[owner].spec
        if spec is not None:
            own = owner in self._outside
            found = rounded(owner, self._source.tensor(f"{owner}.weight"), spec) if own else self._source.linear(owner)
            blocks, moved = blocks_of(found)
            if turned is not None:
                blocks = unpermuted(torch.from_numpy(blocks), turned).numpy()
            return Made(TensorInfo(entry.name, tuple(blocks.shape), blocks.nbytes, type_of(spec)), blocks, moved)
        value = self._plain(owner, last, linear)
        if value.dim() == 1:
            norm = 0.0 if linear or last != "weight" else self._architecture.norm_offset
            value = value.float() + norm
        if turned is not None:
            value = unpermuted(value.reshape(len(value), -1), turned).reshape(value.shape)
        # In 16 bits a router would have its input rounded too, and choose other experts.
        return _narrowed(entry.name, value.detach().cpu(), owner in self._gates)

    def _plain(self, owner: str, last: str, linear: bool) -> torch.Tensor:
        if not linear:
            return self._source.tensor(f"{owner}.{last}" if owner else last)
        found = self._source.linear(owner)
        return torch.as_tensor(found.weight if last == "weight" else found.bias)

    def _experts(self, entry: Entry) -> Made:
        """Returns one matrix of all experts of a block as one tensor (experts, out, in)."""
        spec: QuantSpec | None = self._specs[entry.owner]
        if spec is None:
            whole = [torch.as_tensor(self._source.linear(n).weight).detach().cpu() for n in entry.experts]
            return _narrowed(entry.name, torch.stack(whole), False)
        rows, columns = self._network.shapes[entry.owner]
        values, held = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_of(spec)]]
        blocks, moved = np.empty((len(entry.experts), rows, held * columns // values), np.uint8), 0.0
        for place, name in zip(blocks, entry.experts, strict=True):
            place[...], change = blocks_of(self._source.linear(name))
            moved = max(moved, change)
        info = TensorInfo(entry.name, tuple(blocks.shape), math.prod(blocks.shape), type_of(spec))
        return Made(info, blocks, moved)


def _entries(network: Network) -> Iterator[Entry]:
    """Yields every tensor in the order of the model; of experts that are one tensor the first stands for all."""
    names, tied, stacked = names_of(network), tied_parameters(network.model), stacked_experts(network)
    together: dict[str, list[str]] = {}
    for linear, whole in stacked.items():
        together.setdefault(whole, []).append(linear)
    for owner, last, dims in _parameters(network):
        name = f"{owner}.{last}" if owner else last
        stored = names(name)
        if name in tied or stored is None:
            continue
        if owner in stacked:
            members = together[stacked[owner]]
            if members[0] == owner:
                yield Entry(stored, owner, last, 3, tuple(members))
            continue
        yield Entry(stored, owner, last, dims)


def _parameters(network: Network) -> Iterator[tuple[str, str, int]]:
    """Yields (owner, last name, dimensions) of the model's parameters as they were before Linears were replaced."""
    linears = network.linears
    for owner, module in network.model.named_modules():
        if owner in linears:
            yield owner, "weight", 2
            if getattr(linears[owner], "bias", None) is not None:
                yield owner, "bias", 1
        elif not is_inside(owner, linears):
            yield from ((owner, n, value.dim()) for n, value in module.named_parameters(recurse=False))


def _narrowed(name: str, value: torch.Tensor, wide: bool) -> Made:
    """Returns an unquantized tensor: fp32 with one dimension or where it is to be `wide`, else 16 bits where that loses nothing."""
    dtype = torch.float32
    if value.dim() > 1 and not wide:
        halves = (torch.float16, torch.bfloat16)
        dtype = next((t for t in halves if torch.equal(value.to(t).to(value.dtype), value)), dtype)
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    held = value.to(dtype).contiguous()
    array = (held.view(torch.uint16) if kind == "BF16" else held).numpy()
    return Made(TensorInfo(name, tuple(value.shape), array.nbytes, kind), array)
