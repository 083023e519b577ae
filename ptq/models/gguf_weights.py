"""Weights of a GGUF file as a folder of safetensors, dequantized and written one tensor at a time."""

import copy
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from ptq.files.gguf_header import StoredTensor, metadata_of, tensors_of
from ptq.files.safetensors_file import write_one_by_one
from ptq.models.locations import ModelSource
from ptq.models.rounding import beyond


class _NotOneByOne(Exception):
    """Raised where transformers makes one weight of several tensors of the file, as it does for experts."""


def convert_gguf(source: ModelSource, config: Any, rounding: torch.dtype, folder: pathlib.Path) -> bool:
    """Writes the model of a GGUF file into `folder`, as ``save_pretrained`` does, in the type `rounding`.

    gguf dequantizes, and transformers undoes what llama.cpp did to rows and columns: weights have the bits that transformers
    loads, rounded. One tensor at a time is in memory, and no page of the file stays there.

    Args:
        source: where the file is.
        config: the model's, read out of it.
        rounding: type of the weights.
        folder: where to.

    Returns:
        Whether it could be done so: False, and no weights written, where one is made of several tensors of the file, as those of
        experts are, or where some are not in the file.

    Raises:
        OverflowError: when a weight is beyond the range of fp16 and that is `rounding`.
        UserError: for a file that transformers or gguf cannot read.
    """
    path = pathlib.Path(source.location.base) / str(source.location.gguf)
    model = source.guarded(lambda: _on_meta(config))
    if any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model)):
        return False
    architecture = str(metadata_of(path, {"general.architecture"})["general.architecture"])
    # What llama.cpp did to a tensor depends on the config, such as its numbers of heads: to transformers on those that the file
    # names, without defaults, which reading it again tells.
    named = source.guarded(lambda: load_gguf_checkpoint(str(path))["config"])
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=named)
    names = source.guarded(lambda: get_gguf_hf_weights_map(model, processor))
    tensors = [tensor for tensor in tensors_of(path) if tensor.name in names]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {names[tensor.name]: shapes.get(names[tensor.name], ()) for tensor in tensors}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if len(there) != len(tensors) or any(name not in there and tied.get(name) not in there for name in shapes):
        return False

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in tensors:
            value = source.guarded(functools.partial(_weight, path, tensor, processor, names))
            if value is None or tuple(value.shape) != there[names[tensor.name]]:
                raise _NotOneByOne
            if rounding == torch.float16 and beyond(value, rounding):
                raise OverflowError(str(rounding))
            yield names[tensor.name], value.to(rounding)

    try:
        write_one_by_one(folder / "model.safetensors", there, rounding, values(), {"format": "pt"})
    except _NotOneByOne:
        return False
    model.config.dtype = rounding
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return True


def _on_meta(config: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def _weight(
    path: pathlib.Path, tensor: StoredTensor, processor: TensorProcessor, names: dict[str, str]
) -> torch.Tensor | None:
    """Returns a tensor of the file as the model has it, in fp32; None where it is no weight by itself.

    Plain reads, not a memory map: pages of a map count as the process's memory for as long as it lives.
    """
    kind = gguf.GGMLQuantizationType(tensor.kind)
    stored = np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)
    done = processor.process(
        weights=gguf.dequantize(stored.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, kind)), kind),
        name=tensor.name,
        tensor_key_mapping=names,
        parsed_parameters={"tensors": {}},
    )
    return torch.from_numpy(np.ascontiguousarray(done.weights)).float() if done.name == tensor.name else None
