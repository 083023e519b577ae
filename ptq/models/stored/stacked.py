"""Tensors that a model holds in one piece and its checkpoint in many, such as experts: read from where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from ptq.files.safetensors_file import StoredTensor, TensorDigests

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

HALVES = 2
"""Parts of an expert's matrix that a checkpoint may hold apart: gate and up."""


class Matrix(Protocol):
    """One of the matrices of a stack, as it lies in a checkpoint."""

    @property
    def file(self) -> Any:
        """The file of its numbers, or of the first of them."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is read as."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""

    def read(
        self,
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        digests: TensorDigests | None = None,
    ) -> torch.Tensor:
        """Returns it, as `StoredTensor.read` does."""

    def overflows(self, dtype: torch.dtype) -> bool:
        """Returns whether a value may be beyond the range of `dtype`."""


M = TypeVar("M", bound=Matrix)


@dataclass(frozen=True)
class JoinedTensor:
    """One matrix, (rows, columns), whose rows lie in several stored tensors, one after another."""

    parts: tuple[StoredTensor, ...]

    @property
    def file(self) -> Any:
        """The file of the first part."""
        return self.parts[0].file

    @property
    def dtype(self) -> torch.dtype:
        """Of the parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(
        self,
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        digests: TensorDigests | None = None,
    ) -> torch.Tensor:
        """Returns the matrix, as `StoredTensor.read` does."""
        read = [part.read(rounding, arithmetic, device, digests) for part in self.parts]
        return read[0] if len(read) == 1 else torch.cat(read)

    def overflows(self, dtype: torch.dtype) -> bool:
        """Returns whether a value is beyond the range of `dtype`."""
        return any(part.overflows(dtype) for part in self.parts)


@dataclass(frozen=True)
class StackedTensor(Generic[M]):
    """A tensor (n, rows, columns) whose matrices are read one by one."""

    matrices: tuple[M, ...]

    @property
    def file(self) -> Any:
        """The file of the first matrix."""
        return self.matrices[0].file

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.matrices[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return (len(self.matrices), *self.matrices[0].shape)

    def read(
        self,
        rounding: torch.dtype,
        arithmetic: torch.dtype,
        device: torch.device,
        digests: TensorDigests | None = None,
    ) -> torch.Tensor:
        """Returns the whole tensor, as `StoredTensor.read` does; a matrix at a time."""
        first = self.matrices[0].read(rounding, arithmetic, device, digests)
        whole = torch.empty(self.shape, dtype=first.dtype, device=device)
        whole[0].copy_(first)
        for place, matrix in zip(whole[1:], self.matrices[1:], strict=True):
            place.copy_(matrix.read(rounding, arithmetic, device, digests))
        return whole

    def overflows(self, dtype: torch.dtype) -> bool:
        """Returns whether a value is beyond the range of `dtype`."""
        return any(matrix.overflows(dtype) for matrix in self.matrices)

    def row(self, shape: tuple[int, ...], index: int) -> M:
        """Returns one matrix. Raises ValueError for another shape than this tensor's."""
        if tuple(shape) != self.shape:
            raise ValueError(f"{self.shape} is not {tuple(shape)}")
        return self.matrices[index]


def only_stacks(mapping: "Sequence[WeightTransform]") -> bool:
    """Returns whether all that transformers does to a checkpoint's tensors is to rename, stack and join them."""
    # Imports torch.distributed, a second: a sweep that is finished loads nothing.
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return all(type(op) in {MergeModulelist, Concatenate} for entry in converters for op in entry.operations)


def stacked_tensors(
    model: Any, names: Sequence[str], stored: Mapping[str, StoredTensor]
) -> dict[str, StackedTensor[JoinedTensor]] | None:
    """Returns where the parameters `names` lie, of three dimensions each; None where that is not seen of one of them.

    transformers is asked: it turns numbers back into what it would save, and the numbers tell which part of a parameter a
    tensor of the checkpoint is.

    Args:
        model: on the meta device.
        names: of parameters that the checkpoint does not hold as they are.
        stored: what it holds, by its own names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    if any(len(shape) != 3 for shape in shapes.values()):
        return None
    numbers: dict[str, torch.Tensor] = {}
    owner: list[tuple[str, int, int]] = []
    for name, shape in shapes.items():
        first = len(owner)
        owner += [(name, matrix, half) for matrix in range(shape[0]) for half in range(HALVES)]
        numbers[name] = torch.arange(first, len(owner), dtype=torch.float64).view(shape[0], HALVES, 1)
    found: dict[tuple[str, int], dict[int, StoredTensor]] = {}
    for published, tensor in revert_weight_conversion(model, numbers).items():
        rows = [owner[int(number)] for number in tensor.flatten().tolist()]
        name, matrix, half = rows[0]
        whole = rows == [(name, matrix, h) for h in range(HALVES)] and tuple(tensor.shape) == (HALVES, 1)
        if published not in stored or not (whole or (len(rows) == 1 and shapes[name][1] % HALVES == 0)):
            return None
        expected = (shapes[name][1] // (1 if whole else HALVES), shapes[name][2])
        if stored[published].shape != expected:
            return None
        found.setdefault((name, matrix), {})[half] = stored[published]
    stacked = {}
    for name, shape in shapes.items():
        parts = [found.get((name, matrix), {}) for matrix in range(shape[0])]
        matrices = tuple(JoinedTensor(tuple(part[half] for half in sorted(part))) for part in parts if part)
        if len(matrices) != shape[0] or any(matrix.shape != shape[1:] for matrix in matrices):
            return None
        stacked[name] = StackedTensor(matrices)
    return stacked
