"""What steps have done to embedding, final norm and head, beside the saved blocks of a run."""

import pathlib
from collections.abc import Mapping

import torch

from ptq.export.quantized_tensors import narrowed
from ptq.files.safetensors_file import StoredTensor, read_header, write_tensors
from ptq.models.loading import NAMES, LoadedModel
from ptq.network.block_stream import BlockStream
from ptq.network.network import Network
from ptq.network.outside import tied_parameters, untie
from ptq.steps._step import RESIDUAL, Step

FILE = "outside.safetensors"


def turns_stream(steps: Mapping[str, Step]) -> str | None:
    """Returns the first step that acts on the residual stream as a whole, and so on what lies outside the blocks, or None."""
    return next((name for name, step in steps.items() if RESIDUAL in step.acts), None)


def stored_type(loaded: LoadedModel, steps: Mapping[str, Step]) -> torch.dtype | None:
    """Returns the type that embedding and head are stored in where a step has turned them: that which the weights were rounded to.

    None where no step has: they are stored as they are.
    """
    if turns_stream(steps) is None:
        return None
    return next(dtype for dtype, name in NAMES.items() if name == loaded.baseline_dtype)


def write_outside(stream: BlockStream, dtype: torch.dtype | None, folder: pathlib.Path) -> None:
    """Writes the parameters outside the blocks as the steps leave them, matrices rounded to the `stored_type`; nothing for None.

    A head that is still the embedding's weight is left out.
    """
    if dtype is None or not stream.world.leads:
        return
    model = stream.network.model
    with stream.hold_outside():
        tied = tied_parameters(model)
        modules = ((name, model.get_submodule(name)) for name in stream.network.outside)
        state = {
            f"{name}.{key}": tensor
            for name, module in modules
            for key, tensor in module.named_parameters(recurse=False)
        }
        kept = {name: narrowed(tensor, dtype) for name, tensor in state.items() if name not in tied}
        write_tensors(folder / FILE, kept)


def read_outside(network: Network, folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns what `write_outside` wrote, by full name; the model's head is untied where it was. Empty where there is nothing.

    Raises:
        OSError, ValueError: for a damaged file.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    found = read_header(path)
    if found.keys() & tied_parameters(network.model):
        untie(network.model)
    return found
