"""llama.cpp's importance matrix: what it weighs errors of rounding by, from calibration statistics."""

import pathlib

import gguf
import numpy as np
import torch

from ptq.calibration.statistics import Statistics
from ptq.errors import UserError
from ptq.files.atomic import write_atomic


def write_imatrix(statistics: Statistics, architecture: gguf.MODEL_ARCH, blocks: int, path: pathlib.Path) -> int:
    """Writes the sums of squares of every Linear's input in GGUF, as ``llama-quantize --imatrix`` reads it; returns how many Linears.

    Args:
        statistics: of the Linears' inputs.
        architecture: how llama.cpp calls the model's tensors.
        blocks: of the model.
        path: of the file, replaced when it is there.

    Raises:
        UserError: for a Linear that llama.cpp has no tensor for, or when the file cannot be written.
    """
    table = gguf.get_tensor_name_map(architecture, blocks)
    names = {name: table.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in statistics.inputs}
    unknown = next((name for name, found in names.items() if found is None), None)
    if unknown is not None:
        raise UserError(f"--imatrix: llama.cpp has no tensor for {unknown}: leave --imatrix out")

    def fill(temporary: pathlib.Path) -> None:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [statistics.provenance.data_source or "unknown"])
        writer.add_uint32("imatrix.chunk_count", statistics.provenance.samples)
        writer.add_uint32("imatrix.chunk_size", statistics.provenance.length)
        for name, found in statistics.inputs.items():
            writer.add_tensor(f"{names[name]}.in_sum2", _squares(found.mean, found.m2, found.count))
            writer.add_tensor(f"{names[name]}.counts", np.array([[found.count]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomic(path, fill)
    return len(names)


def _squares(mean: torch.Tensor, m2: torch.Tensor, count: int) -> np.ndarray:
    """Returns the sums of squares, float32 (1, channels), of what has this mean and sum of squared distances from it."""
    total: np.ndarray = (m2 + count * mean.square()).float().cpu().numpy()[None]
    return total
