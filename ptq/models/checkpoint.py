"""How a checkpoint's weights are read by transformers: all of them into memory, or left on disk block by block."""

import contextlib
import pathlib
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.accelerate import accelerate_disk_offload

from ptq.errors import UserError
from ptq.files.safetensors_file import StoredTensor, TensorDigests, read_header
from ptq.files.scratch import ScratchFolder
from ptq.models.locations import ModelSource, quiet
from ptq.models.memory.resident_memory import return_freed_memory
from ptq.models.rounding import beyond, round_in_place
from ptq.models.stored.mxfp4 import mxfp4_tensors, published_in_mxfp4
from ptq.models.stored.stacked import only_stacks, stacked_tensors
from ptq.models.weights import OffloadedWeights, OnDisk, ResidentWeights, Weights, refuse_not_finite, shards_of

TRIM_EVERY = 1 << 25
"""Bytes of weights read after which the pieces that they came in are given back to the system."""


def _pretrained(source: ModelSource, options: dict[str, Any]) -> Any:
    """Returns the model; weights that the checkpoint lacks are refused instead of made up."""
    location = source.location
    options = {**source.arguments, **options}
    if location.kind != "gguf":
        options["use_safetensors"] = True  # never a pickle
    model, info = source.guarded(
        lambda: AutoModelForCausalLM.from_pretrained(location.base, output_loading_info=True, **options)
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model.path: {source.config.path} lacks {missing[0]} and {len(missing) - 1} more weights: "
            "expected a causal language model"
        )
    return model


def read_resident(
    source: ModelSource,
    rounding: torch.dtype,
    arithmetic: torch.dtype,
    device: torch.device,
    digests: TensorDigests | None = None,
) -> tuple[Any, Weights] | None:
    """Returns the model in memory, or None when a weight is beyond the range of `rounding`.

    Parameters are read one by one where each of them lies in the checkpoint, so that the model is all that is in memory; experts
    too, which the model stacks. What transformers changes otherwise while it reads is read by it, and rounded after. `digests`
    notes the digests of what is read one by one.
    """
    try:
        if (
            source.location.kind != "gguf"
            and (filled := _filled(source, rounding, arithmetic, device, digests)) is not None
        ):
            return filled, ResidentWeights()
    except OverflowError:
        return None
    model = _pretrained(source, {"dtype": arithmetic})
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if rounding == torch.float16 and beyond(parameter, rounding):
            return None
        round_in_place(parameter, rounding)
        refuse_not_finite(name, parameter, source.config.path)
    if source.location.kind == "gguf":  # its weights are plain tensors now: nothing shall treat the model as quantized
        for owner, name in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "quantization_method"),
        ):
            owner.__dict__.pop(name, None)
        model.is_quantized = False
    return model.to(device), ResidentWeights()


def _filled(
    source: ModelSource,
    rounding: torch.dtype,
    arithmetic: torch.dtype,
    device: torch.device,
    digests: TensorDigests | None,
) -> Any | None:
    """Returns the model, each parameter read by itself; None for one that transformers has to read.

    Raises:
        OverflowError: when a weight is beyond the range of `rounding`.
    """
    if (found := _mapped(source, arithmetic)) is None:
        return None
    model, stored = found
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept_wide = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    if arithmetic != torch.float32 and kept_wide:
        return None  # which of them stay in fp32 is transformers' to say
    if any(name in stored and stored.get(other) != stored[name] for name, other in tied.items()):
        return None  # both are stored: whether they are tied depends on their values
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if any(name not in stored or stored[name].shape != shape for name, shape in shapes.items()):
        return None
    parameters, since = dict(model.named_parameters()), 0
    for name in shapes:
        if name in tied:
            continue
        outer, _, inner = name.rpartition(".")
        module = model.get_submodule(outer)
        if name not in parameters:
            module._buffers[inner] = stored[name].read(arithmetic, arithmetic, device, digests)
            continue
        if rounding == torch.float16 and stored[name].overflows(rounding):
            raise OverflowError(name)
        value = stored[name].read(rounding, arithmetic, device, digests)
        module._parameters[inner] = torch.nn.Parameter(value, requires_grad=False)
        refuse_not_finite(name, value, str(stored[name].file))
        since += value.nbytes
        if since > TRIM_EVERY:
            return_freed_memory()
            since = 0
    return_freed_memory()
    model.tie_weights()
    if model.can_generate():
        options = {key: value for key, value in source.arguments.items() if key in {"revision", "local_files_only"}}
        # One that was not saved is made of the config, which the model has done.
        with contextlib.suppress(OSError), quiet():
            model.generation_config = GenerationConfig.from_pretrained(source.location.base, **options)
    return model.to(device)


def _stored(index: dict[str, Any]) -> dict[str, OnDisk]:
    """Returns the place of each weight by accelerate's index."""
    headers: dict[str, dict[str, StoredTensor]] = {}
    stored: dict[str, OnDisk] = {}
    for name, entry in index.items():
        file = entry["safetensors_file"]
        if file not in headers:
            headers[file] = read_header(pathlib.Path(file))
        stored[name] = headers[file][entry.get("weight_name", name)]
    return stored


def read_offloaded(
    source: ModelSource,
    rounding: torch.dtype,
    arithmetic: torch.dtype,
    device: torch.device,
    ahead: bool = True,
    digests: TensorDigests | None = None,
) -> tuple[Any, Weights] | None:
    """Returns the model on meta with the place of each weight on disk, or None when one is beyond the range of `rounding`.

    transformers, through accelerate, says which stored tensor is which parameter. `ahead` and `digests`: see `OffloadedWeights`.
    """
    folder: Any = None
    if (found := _mapped(source, arithmetic)) is not None:
        model, stored = found
    else:
        model, index, folder = _converted(source, arithmetic)
        stored = dict(_stored(index))
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if other in stored:
            stored[name] = stored[other]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta" and (name not in stored or stored[name].shape != tensor.shape):
            raise UserError(
                f"execution.weights: 'offloaded', but {name} is not on disk as the config says: use resident"
            )
    if rounding == torch.float16 and any(tensor.overflows(rounding) for tensor in dict.fromkeys(stored.values())):
        return None
    for buffers in (module._buffers for module in model.modules()):
        for name, buffer in buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                buffers[name] = buffer.to(device)
    return model, OffloadedWeights(model, stored, rounding, arithmetic, device, folder, ahead, digests)


def _mapped(source: ModelSource, arithmetic: torch.dtype) -> tuple[Any, dict[str, OnDisk]] | None:
    """Returns the model on meta and the place of each weight, none read; None where weights must be converted."""
    location, arguments = source.location, source.arguments
    folder = pathlib.Path(location.base)
    if location.kind == "hub":
        files = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
        options: dict[str, Any] = {
            key: value for key, value in arguments.items() if key in {"revision", "local_files_only"}
        }
        folder = pathlib.Path(source.guarded(lambda: snapshot_download(location.base, allow_patterns=files, **options)))
    found = source.guarded(lambda: AutoConfig.from_pretrained(location.base, **arguments))
    if packed := published_in_mxfp4(found):
        del found.quantization_config  # what is read is what its codes stand for
    # Only parameters go to meta: buffers such as rotary frequencies are computed by the model, not stored.
    with init_empty_weights(include_buffers=False):
        trust = source.config.trust_remote_code
        model = source.guarded(
            lambda: AutoModelForCausalLM.from_config(found, dtype=arithmetic, trust_remote_code=trust)
        )
    mapping = get_model_conversion_mapping(model)
    if not only_stacks(mapping):
        return None
    shards = shards_of(folder)
    headers = {shard.name: read_header(shard) for shard in shards}
    names = {name: shard for shard, header in headers.items() for name in header}
    index = accelerate_disk_offload(model, None, [str(s) for s in shards], {"": "disk"}, {"weight_map": names}, mapping)
    missing = [name for name, _ in model.named_parameters() if name not in index]
    there = {name: tensor for header in headers.values() for name, tensor in header.items()}
    experts = mxfp4_tensors(model, missing, there) if packed else {}
    if packed and (absent := next((name for name in missing if name not in experts), None)) is not None:
        raise UserError(
            f"model.path: {source.config.path} says that its experts are in MXFP4, but holds no codes and scales of {absent} that fit its config.json: "
            "download the model again"
        )
    missing = [name for name in missing if name not in experts]
    stacked = stacked_tensors(model, missing, there) if missing else {}
    return None if stacked is None else (model, {**_stored(index), **experts, **stacked})


def _converted(source: ModelSource, arithmetic: torch.dtype) -> tuple[Any, dict[str, Any], Any]:
    """Like `_mapped` for checkpoints that transformers converts while it reads them, such as experts that become one tensor.

    All shards pass through memory maps once. Converted weights are written to a temporary folder, the last item returned.
    """
    folder = ScratchFolder("ptq-offload")
    options = {"dtype": arithmetic, "device_map": {"": "disk"}, "offload_folder": folder.name}
    model = _pretrained(source, options)
    index = _index(model)
    remove_hook_from_submodules(model)
    return model, index, folder


def _index(model: Any) -> dict[str, Any]:
    """Returns accelerate's index: full parameter name -> shard and the name in it, which may differ."""
    for module in model.modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            index: dict[str, Any] = weights_map.dataset.index
            return index
    raise UserError("execution.weights: 'offloaded' found nothing to offload in this model: use resident")
